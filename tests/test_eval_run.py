"""Accuracy: batched decoding equals decoding alone, scoring rules, averages, contexts, files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.answers import answers_match, extract_answer
from data.contexts import student_context, teacher_context
from data.example import Example
from data.miniworld.world import TASKS
from data.parquet import ParquetSource
from data.processor import Processor
from data.streams import stream_seed
from eval import run
from eval.run import Prediction, all_scores, context_of, score
from eval.statistics import wilson_interval
from inferencer import Completion
from modeling.generation import Rollout, Round, SamplingParams, generate
from modeling.pretrained import load_pretrained
from modeling.sequence import Image
from tests.eval_helpers import ROWS, flags, write_world
from train.records import RECORD_FIELDS, read_records

TOKENS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def processor(world: Path) -> Processor:
    return Processor.from_pretrained(world / "base")


def examples(world: Path, task: str = TASKS[0], rows: int = ROWS) -> list[Example]:
    source = ParquetSource(world / "datasets", task, "validation")
    return [source.example(row) for row in range(rows)]


def rollout(*ids: int, ended_by: str = "eos") -> Rollout:
    return Rollout((Round(ids, ended_by, (0.0,) * len(ids)),))


def scored(example: Example, text: str) -> Prediction:
    return score(example, Completion(text, extract_answer(text), rollout(5, 6)), seconds=0.5)


@pytest.mark.parametrize("context", ["student", "teacher_noise"])
def test_batches_decode_like_each_sample_alone(
    world: Path, processor: Processor, tmp_path: Path, context: str
) -> None:
    run.main(flags(world, tmp_path, context=context, batch_size=4, max_new_tokens=TOKENS))
    records = read_records(tmp_path / "predictions.jsonl")
    model = load_pretrained(world / "base")
    expected = {}
    for task in TASKS:
        for example in examples(world, task):
            segments = context_of(example, processor, context, seed=0)
            greedy = SamplingParams(TOKENS, temperature=0.0, max_image_skips=0)
            [alone] = generate(model, [segments], processor.tokenizer, greedy)
            text = processor.tokenizer.decode(alone.token_ids)
            answer = extract_answer(text)
            right = answer is not None and answers_match(answer, example.answer)
            expected[example.key] = (text, len(alone.token_ids), alone.ended_by, right)
    found = {
        r["id"]: tuple(r["values"][k] for k in ("text", "tokens", "ended_by", "correct"))
        for r in records
    }
    assert found == expected
    assert len({text for text, *_ in expected.values()}) > 1


def test_a_model_that_knows_the_answers_scores_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right on two tasks, wrong on one, mute on one; only the decoder is replaced."""
    tokenizer = Processor.from_pretrained(world / "base").tokenizer
    gold = {}  # the questions of these four differ
    for task in TASKS:
        [first] = examples(world, task, rows=1)
        gold[tuple(tokenizer.encode(first.question))] = (task, first.answer)

    def knowing(model, contexts, tokenizer, params, seeds, workspace):
        rollouts = []
        for segments in contexts:
            task, answer = gold[segments[-1].token_ids]
            said = {TASKS[2]: "wrong", TASKS[3]: None}.get(task, answer)
            text = answer if said is None else f"<answer>{said}</answer>"
            rollouts.append(rollout(*tokenizer.encode(text)))
        return rollouts

    monkeypatch.setattr("inferencer.generate", knowing)
    run.main(flags(world, tmp_path, limit_per_task=1, max_new_tokens=TOKENS))
    scores = {r["task"]: r["values"] for r in read_records(tmp_path / "scores.json")}
    assert len(gold) == 4
    assert [scores[task]["accuracy"] for task in TASKS] == [1.0, 1.0, 0.0, 0.0]
    assert [scores[task]["unparsed_rate"] for task in TASKS] == [0.0, 0.0, 0.0, 1.0]
    assert scores["overall"]["accuracy"] == 0.5 and scores["overall"]["n"] == 4


def test_unparsed_is_wrong_and_counted_apart(world: Path) -> None:
    [example] = examples(world, rows=1)
    right = scored(example, f"<think>x</think><answer> {example.answer.upper()} </answer>")
    wrong = scored(example, "<answer>zebra</answer>")
    bare = scored(example, example.answer)  # no tag: not an answer, whatever it says
    cut = scored(example, f"<answer>{example.answer}")
    assert [p.correct for p in (right, wrong, bare, cut)] == [True, False, False, False]
    assert [p.answer is None for p in (right, wrong, bare, cut)] == [False, False, True, True]
    scores = all_scores([right, wrong, bare, cut])[example.source]
    assert (scores["n"], scores["accuracy"], scores["unparsed_rate"]) == (4, 0.25, 0.5)


def test_overall_is_the_mean_of_tasks() -> None:
    def prediction(task: str, correct: bool, tokens: int, seconds: float) -> Prediction:
        return Prediction(task, "", "", "", "", correct, tokens, "eos", 0, 0, seconds)

    rows = [prediction("a", i < 9, 4, 0.1) for i in range(10)] + [
        prediction("b", False, 8, 0.3),
        prediction("b", False, 8, 0.5),
    ]
    scores = all_scores(rows)
    assert scores["a"]["accuracy"] == 0.9 and scores["b"]["accuracy"] == 0.0
    assert (scores["a"]["low"], scores["a"]["high"]) == wilson_interval(0.9, 10)
    overall = scores["overall"]
    assert overall["accuracy"] == 0.45 and overall["n"] == 12  # 9 of 12 would be 0.75
    assert (overall["low"], overall["high"]) == wilson_interval(0.45, 12)
    assert overall["mean_tokens"] == 6.0
    assert scores["b"]["seconds_per_sample"] == pytest.approx(0.4)


def test_contexts(world: Path, processor: Processor) -> None:
    [example] = examples(world, rows=1)

    def patches(name: str, seed: int = 0):
        segments = context_of(example, processor, name, seed)
        return [s.patches for s in segments if isinstance(s, Image)]

    student = context_of(example, processor, "student", 0)
    assert student[-1] == student_context(example, processor)[-1]
    assert len(patches("student")) == len(patches("prompts_only")) == 1
    assert len(context_of(example, processor, "prompts_only", 0)) == 5
    [_, real] = patches("teacher")
    assert real.equal(teacher_context(example, processor)[-2].patches)
    [_, noise] = patches("teacher_noise")
    assert noise.shape == real.shape and abs(float(noise.std()) - 1) < 0.05
    assert noise.equal(patches("teacher_noise")[1])
    assert not noise.equal(patches("teacher_noise", seed=1)[1])


def test_sampling_is_keyed_by_the_example(
    world: Path, processor: Processor, tmp_path: Path
) -> None:
    """The same text in any batch, and the one that its own stream gives."""
    texts = []
    for batch_size in (1, 4):
        output = tmp_path / str(batch_size)
        run.main(
            flags(
                world, output, temperature=1, limit_per_task=3, batch_size=batch_size,
                max_new_tokens=TOKENS, seed=7,
            )
        )  # fmt: skip
        texts.append([r["values"]["text"] for r in read_records(output / "predictions.jsonl")])
    assert texts[0] == texts[1]
    [example] = examples(world, rows=1)
    model = load_pretrained(world / "base")
    seeds = [stream_seed(7, "rollout", example.key)]
    context = student_context(example, processor)
    params = SamplingParams(TOKENS, 1.0, 0)
    [alone] = generate(model, [context], processor.tokenizer, params, seeds)
    assert texts[0][0] == processor.tokenizer.decode(alone.token_ids)


def test_result_files(world: Path, tmp_path: Path, capsys) -> None:
    run.main(flags(world, tmp_path, limit_per_task=2, max_new_tokens=2, batch_size=4))
    samples = read_records(tmp_path / "predictions.jsonl")
    first = [f"{task}/{e.pid}" for task in TASKS for e in examples(world, task, rows=2)]
    assert [r["id"] for r in samples] == first
    assert set(RECORD_FIELDS) <= set(samples[0]) and samples[0]["kind"] == "accuracy"
    assert set(samples[0]["values"]) == {
        "text", "answer", "gold", "correct", "parsed", "tokens", "ended_by", "skips", "pictures",
        "seconds",
        "context", "split", "batch_size",
    }  # fmt: skip
    totals = read_records(tmp_path / "scores.json")
    assert [r["task"] for r in totals] == [*TASKS, "overall"]
    assert totals[0]["values"]["batch_size"] == 4 and totals[0]["values"]["context"] == "student"
    out = capsys.readouterr().out
    assert "batches of 4" in out and all(task in out for task in TASKS)
    parameters = sum(p.numel() for p in load_pretrained(world / "base").parameters())
    named = f"{world / 'base' / 'model.safetensors'}: student weights, {parameters / 1e6:.2f} M"
    assert f"opened {named} parameters" in out


def test_ema_weights_are_announced(world: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(world / "base", tmp_path / "both")
    shutil.copy(world / "other" / "model.safetensors", tmp_path / "both" / "ema.safetensors")
    changes = {"model_path": tmp_path / "both", "limit_per_task": 1, "max_new_tokens": 1}
    run.main(flags(world, tmp_path / "out", **changes))
    assert f"{tmp_path / 'both' / 'ema.safetensors'}: ema weights" in capsys.readouterr().out
    run.main(flags(world, tmp_path / "out", weights="student", **changes))
    assert f"{tmp_path / 'both' / 'model.safetensors'}: student w" in capsys.readouterr().out


def test_a_damaged_row_is_left_out_and_told(world: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "datasets"
    shutil.copytree(world / "datasets", root)
    damage(root, TASKS[0], [2])
    run.main(flags(world, tmp_path / "out", data_root=root, max_new_tokens=2, batch_size=8))
    scores = {r["task"]: r["values"] for r in read_records(tmp_path / "out" / "scores.json")}
    counts = {task: row["n"] for task, row in scores.items()}
    assert counts == {TASKS[0]: ROWS - 1, **dict.fromkeys(TASKS[1:], ROWS), "overall": 4 * ROWS - 1}
    unusable = {task: row["unusable_rows"] for task, row in scores.items()}
    assert unusable == {TASKS[0]: 1, **dict.fromkeys(TASKS[1:], 0), "overall": 1}
    out = capsys.readouterr().out
    assert "1 unusable rows" in out and "row 2" in out


def test_too_many_unusable_rows_stop_the_run(
    world: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of the trainers: the share is judged, once enough rows have been tried."""
    root = tmp_path / "datasets"
    shutil.copytree(world / "datasets", root)
    damage(root, TASKS[0], [1])
    damage(root, TASKS[1], [0, 3])
    arguments = flags(world, tmp_path / "out", data_root=root, max_new_tokens=2, batch_size=8)
    monkeypatch.setattr("data.parquet.MIN_JUDGED_ROWS", ROWS + 4)
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2
    assert error.startswith(f"error: 3 of {ROWS + 4} rows were unusable") and "row 3 of" in error
    assert "max_skip_fraction=0.01" in error and not (tmp_path / "out").exists()


def test_a_task_without_a_usable_row_stops_the_run(world: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "datasets"
    shutil.copytree(world / "datasets", root)
    damage(root, TASKS[1], range(ROWS))
    with pytest.raises(SystemExit):
        run.main(flags(world, tmp_path / "out", data_root=root, max_new_tokens=2))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{TASKS[1]}: no usable row; the last one: " in error and "column problem_image" in error


def damage(root: Path, task: str, rows: Iterable[int]) -> None:
    """Replace the problem images of rows by bytes that are no picture."""
    [file] = (root / task / "data").glob("*.parquet")
    table = pq.read_table(file)
    records = table.to_pylist()
    for row in rows:
        records[row]["problem_image_0"]["bytes"] = b"not a picture"
    pq.write_table(pa.Table.from_pylist(records, table.schema), file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_path": "nowhere"}, ["nowhere is not a folder"]),
        ({"weights": "ema"}, ["ema.safetensors"]),
        ({"data_root": "nowhere"}, ["nowhere", "pass the data root"]),
        ({"limit_per_task": 0}, ["--limit_per_task must be at least 1"]),
        ({"temperature": -1}, ["--temperature"]),
    ],
)
def test_bad_input_is_one_line(world: Path, tmp_path: Path, capsys, changes, words) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main(flags(world, tmp_path, **changes))
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words)


def test_unknown_flags_and_contexts_are_refused(world: Path, tmp_path: Path, capsys) -> None:
    for changes in ({"contxt": "student"}, {"context": "oracle"}):
        with pytest.raises(SystemExit) as exit_:
            run.main(flags(world, tmp_path, **changes))
        assert exit_.value.code == 2
    assert "oracle" in capsys.readouterr().err
