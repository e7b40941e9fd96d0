"""InterleaveInferencer and the demo: the tokens of the model's own decoding, and clear errors."""

import re
import shlex
from pathlib import Path

import PIL.Image
import pytest

from data.contexts import drawing_size, question_context
from data.miniworld.model import write_untrained
from data.miniworld.world import TASKS, split_of
from data.streams import stream_seed
from examples import inference_demo
from examples.inference_demo import draw_example
from inferencer import InterleaveInferencer
from modeling.generation import SamplingParams, generate

TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "base"
    write_untrained(path, seed=0)
    return path


@pytest.fixture(scope="module")
def inferencer(folder: Path) -> InterleaveInferencer:
    return InterleaveInferencer.from_pretrained(folder)


@pytest.fixture(scope="module")
def items() -> list[tuple[list[PIL.Image.Image], str]]:
    drawn = [draw_example(task, seed=5) for task in TASKS]
    pairs = [([item.problem_image], item.question) for item in drawn]
    two_images = ([drawn[0].problem_image, drawn[1].problem_image], drawn[0].question)
    return [*pairs, two_images, ([], "look and answer")]


def by_hand(inferencer: InterleaveInferencer, images, question: str, params, seed=None) -> str:
    processor = inferencer.processor
    context = question_context(images, question, processor)
    seeds = None if seed is None else [seed]
    [rollout] = generate(inferencer.model, [context], processor.tokenizer, params, seeds)
    return processor.tokenizer.decode(rollout.token_ids)


def test_greedy_batches_equal_decoding_alone(inferencer, items) -> None:
    answers = inferencer.answer_batch(items, max_new_tokens=TOKENS)
    greedy = SamplingParams(TOKENS, 0.0, 0)
    texts = [by_hand(inferencer, images, question, greedy) for images, question in items]
    assert [answer.text for answer in answers] == texts
    assert len(set(texts)) > 1


def test_sampling_has_a_stream_per_item(inferencer, items) -> None:
    twice = [
        [a.text for a in inferencer.answer_batch(items, TOKENS, temperature=1.0, seed=3)]
        for _ in range(2)
    ]
    assert twice[0] == twice[1]
    other = inferencer.answer_batch(items, TOKENS, temperature=1.0, seed=4)
    assert [a.text for a in other] != twice[0]
    sampled = SamplingParams(TOKENS, 1.0, 0)
    images, question = items[2]
    alone = by_hand(inferencer, images, question, sampled, stream_seed(3, "rollout", 2))
    assert alone == twice[0][2]


def test_call_takes_an_image_or_a_text_or_both(inferencer, items) -> None:
    [image], question = items[0]
    greedy = SamplingParams(TOKENS, 0.0, 0)
    for images, text, kwargs in [
        ([image], question, {"image": image, "text": question}),
        ([], question, {"text": question}),
        ([image], "", {"image": image}),
    ]:
        limits = {"max_think_token_n": TOKENS + 1, "think": True, "understanding_output": True}
        [piece] = inferencer(**limits, **kwargs)
        resized = [drawing_size(shown, inferencer.processor) for shown in images]
        assert piece == by_hand(inferencer, resized, text, greedy)
    with pytest.raises(ValueError, match="nothing to answer"):
        inferencer()


def test_transparent_images_are_pasted_on_white(inferencer, items) -> None:
    _, question = items[0]
    clear = PIL.Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    white = PIL.Image.new("RGB", (56, 56), (255, 255, 255))
    red = PIL.Image.new("RGB", (56, 56), (255, 0, 0))
    logprobs = [
        inferencer.answer([image], question, max_new_tokens=TOKENS).rollout.logprobs
        for image in (clear, white, red)
    ]
    assert logprobs[0] == logprobs[1] != logprobs[2]


def test_answer_is_what_stands_in_the_tags(inferencer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<think>purple at d2 is moon</think><answer>moon</answer>"
    tokenizer = inferencer.processor.tokenizer
    ids = tokenizer.encode(text)
    written = iter([ids, ids[:-2]])  # the second one is cut off

    def scripted(model, contexts, tokenizer, params, seeds, workspace):
        rollouts = generate(model, contexts, tokenizer, SamplingParams(1, 0.0))
        [first] = rollouts[0].rounds[:1]
        rounds = (type(first)(tuple(next(written)), "eos", ()),)
        return [type(rollouts[0])(rounds)]

    monkeypatch.setattr("inferencer.generate", scripted)
    whole, cut = inferencer.answer([], "look"), inferencer.answer([], "look")
    assert (whole.text, whole.answer) == (text, "moon")
    assert cut.answer is None


def test_drawn_examples_are_test_items_of_their_task() -> None:
    for task in TASKS:
        item = draw_example(task, seed=1)
        assert item.task == task and split_of(item) == "test"
    assert draw_example("any", 2).question == draw_example("any", 2).question
    assert {draw_example("any", seed).task for seed in range(12)} == set(TASKS)


def test_demo_on_a_drawn_picture(folder: Path, inferencer, tmp_path: Path, capsys) -> None:
    """The saved picture, asked about by file, gives the completion of the drawn one."""
    picture = tmp_path / "picture.png"
    common = ["--model_path", str(folder), "--max_new_tokens", str(TOKENS), "--device", "cpu"]
    inference_demo.main([*common, "--example", TASKS[2], "--save_image", str(picture)])
    out = capsys.readouterr().out
    item = draw_example(TASKS[2], seed=0)
    text = by_hand(inferencer, [item.problem_image], item.question, SamplingParams(TOKENS, 0.0, 0))
    assert f"completion: {text}" in out
    assert f"gold:       {item.answer} (wrong, {TASKS[2]})" in out
    assert f" s for {TOKENS} tokens, " in out and "tokens/s" in out
    assert f"opened {folder / 'model.safetensors'}: student weights" in out
    order = ("question:", "completion:", "answer:", "gold:", "time:", "picture:")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(order)
    inference_demo.main([*common, "--image", str(picture), "--question", item.question])
    again = capsys.readouterr().out
    assert f"completion: {text}" in again and "gold" not in again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "none.png", "--question", "x"], ["none.png: no such file"]),
        (["--image", __file__, "--question", "x"], ["not an image", "PNG or JPEG"]),
        (["--example", "--model_path", "nowhere"], ["nowhere: no such folder", "INSTALL.md"]),
        (["--example", "--device", "cuda:77"], ["--device cuda:77", "use --device cpu"]),
        (["--example", "--max_new_tokens", "0"], ["--max_new_tokens must be at least 1"]),
        (["--example", "--temperature", "0"], ["leave out --do_sample"]),
    ],
)
def test_demo_errors_are_one_line(folder: Path, capsys, arguments, words) -> None:
    with pytest.raises(SystemExit) as exit_:
        inference_demo.main(["--model_path", str(folder), *arguments])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--question", "x"], ["--example", "--image", "a.png"], ["--example", "Chess"]],
)
def test_demo_refuses_incomplete_questions(capsys, arguments) -> None:
    with pytest.raises(SystemExit) as exit_:
        inference_demo.main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_demo_help_shows_commands_that_parse(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        inference_demo.main(["--help"])
    out = capsys.readouterr().out
    assert "--image problem.png \\\n" in out  # the backslash is for the reader's shell
    text = out.replace("\\\n", " ")
    commands = re.findall(r"^ +python -m examples.inference_demo (.*)$", text, re.MULTILINE)
    assert exit_.value.code == 0 and len(commands) == 2
    asked, drawn = (inference_demo.parse(shlex.split(command)) for command in commands)
    assert asked.image and asked.question and drawn.example in TASKS
