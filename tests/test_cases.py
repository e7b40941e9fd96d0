"""Cases: which questions are chosen, what is drawn again, and what is said where it is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data.miniworld.world import TASKS
from data.miniworld.write import write_shards
from data.parquet import ParquetSource
from eval import cases, run
from eval.asking import ask
from eval.backends.bagel import BagelSystem
from eval.benchmarks import first_samples
from eval.cases import enlarged, fenced
from eval.predictions import PREDICTIONS, SETTINGS
from eval.protocol import Protocol
from modeling.pretrained import load_pretrained
from tests.eval_helpers import ROWS, write_world
from tests.test_eval_run import flags
from tests.training import drawing_base
from train.records import RECORD_FIELDS, read_records, write_records

TASK, OTHER = TASKS[:2]
# Right or wrong per row of TASK: two rows that the second alone has right, three of the first.
FIRST = [True, False, True, False, True, True]
SECOND = [False, True, False, True, False, True]
PROTOCOL = (
    "name: short\ndecoding: {max_new_tokens: 8}\nimages: null\n"
    "prompt: {option_closing: '', free_closing: '', layout: images_first}\n"
    "drawing: {num_timesteps: 3, cfg_text_scale: 1.0, max_rounds: 1}\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    (root / "short.yaml").write_text(PROTOCOL)
    return root


@pytest.fixture(scope="module")
def answers(world: Path) -> Path:
    """A system that draws and one that does not, with verdicts of ours."""
    folder = world / "answers"
    systems = (f"thinkmorph={drawing_base()}", f"opsd={world / 'base'}")
    run.main(flags(world, folder, *systems, benchmarks=[TASK, OTHER]))
    for system, rights in (("thinkmorph", FIRST), ("opsd", SECOND)):
        for task in (TASK, OTHER):
            judge(folder / system / task, rights if task == TASK else [True] * ROWS)
    return folder


@pytest.fixture
def answered(answers: Path, tmp_path: Path) -> Path:
    """The answers, for a test to change."""
    return shutil.copytree(answers, tmp_path / "answers")


def judge(folder: Path, rights: list[bool]) -> None:
    change(folder, [{"correct": right} for right in rights])


def change(folder: Path, values: list[dict]) -> None:
    records = read_records(folder / PREDICTIONS)
    for record, changes in zip(records, values, strict=True):
        record["values"] |= changes
    write_records(folder / PREDICTIONS, records)


def mine(world: Path, answered: Path, *words: str) -> tuple[Path, list[dict]]:
    output = answered.parent / "cases"
    places = ["--data_root", str(world / "datasets"), "--device", "cpu"]
    systems = ["--first", "thinkmorph", "--second", "opsd"]
    cases.main([str(answered), *systems, *places, "--output_dir", str(output), *words])
    return output, read_records(output / "cases.json")


def pixels(file: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(file).convert("RGB"))


def test_cases_are_the_first_of_each_kind(world: Path, answered: Path) -> None:
    ids = [record["id"] for record in read_records(answered / "opsd" / TASK / PREDICTIONS)]
    for per_task, second, first in ((2, [1, 3], [0, 2]), (9, [1, 3], [0, 2, 4]), (1, [1], [0])):
        _, records = mine(world, answered, "--per_task", str(per_task))
        assert {record["task"] for record in records} == {TASK}  # the other one has no case
        found = [(r["values"]["case"], r["id"]) for r in records]
        assert found == [
            *(("only_second", ids[n]) for n in second),
            *(("only_first", ids[n]) for n in first),
        ]
        totals = {r["values"]["case"]: r["values"]["total"] for r in records}
        assert totals == {"only_second": 2, "only_first": 3}
        places = [r["values"]["place"] for r in records]
        assert places == [*range(1, len(second) + 1), *range(1, len(first) + 1)]


def test_a_case_has_what_was_asked_answered_and_shown(world: Path, answered: Path) -> None:
    output, records = mine(world, answered)
    source = ParquetSource(world / "datasets", TASK, "validation")
    by_pid = {row.pid: row for row in (source.example(n) for n in range(len(source)))}
    for record in records:
        values, row = record["values"], by_pid[record["id"]]
        assert set(RECORD_FIELDS) <= set(record) and record["kind"] == "case"
        assert values["gold"] == row.answer and row.question in values["question"]
        for files, pictures in (
            (values["problem"], [row.problem_image]),
            (values["visual_thoughts"], row.visual_thoughts),
        ):
            for file, picture in zip(files, pictures, strict=True):
                assert np.array_equal(pixels(output / file), np.asarray(enlarged(picture)))
        first, second = values["answers"]
        assert (first["system"], second["system"]) == ("thinkmorph", "opsd")
        assert first["correct"] != second["correct"] and second["pictures"] == []
        assert second["correct"] == (values["case"] == "only_second")
        for answer in values["answers"]:
            stored = read_records(answered / answer["system"] / TASK / PREDICTIONS)
            (known,) = [r["values"]["text"] for r in stored if r["id"] == record["id"]]
            assert answer["text"] == known and answer["redraw_error"] == ""
            assert values["failed"] == 0
            assert known in (output / "cases.md").read_text()


def test_pictures_are_those_of_the_answer(world: Path, answered: Path) -> None:
    """Against the system, asked by hand."""
    output, records = mine(world, answered)
    protocol = Protocol.load(world / "short.yaml")
    config = run.system_config(f"thinkmorph={drawing_base()}").model
    system = BagelSystem.open("x", config, protocol, load_pretrained(world / "base").device)
    samples = {s.id: s for s in first_samples(TASK, world / "datasets", "validation", ROWS)}
    drawn = 0
    for record in records:
        answer = record["values"]["answers"][0]
        (reply,) = ask(system, [samples[record["id"]]], 0, 0)
        assert len(answer["pictures"]) == len(reply.pictures)
        for file, picture in zip(answer["pictures"], reply.pictures, strict=True):
            assert np.array_equal(pixels(output / file), np.asarray(enlarged(picture)))
            drawn += 1
    assert drawn > 0


@pytest.mark.parametrize("shown", ["thinkmorph-noise", "thinkmorph-shuffled", "interleaved-true"])
def test_pictures_shown_instead_are_those_of_the_answer(world: Path, tmp_path: Path, shown) -> None:
    answered = tmp_path / "answers"
    systems = (f"{shown}={drawing_base()}", f"opsd={world / 'base'}")
    run.main(flags(world, answered, *systems, benchmarks=[TASK]))
    for system, rights in ((shown, FIRST), ("opsd", SECOND)):
        judge(answered / system / TASK, rights)
    output, records = mine(world, answered, "--first", shown, "--per_task", "9")
    stored = {r["id"]: r["values"] for r in read_records(answered / shown / TASK / PREDICTIONS)}
    protocol = Protocol.load(world / "short.yaml")
    config = run.system_config(systems[0]).model
    system = BagelSystem.open("x", config, protocol, load_pretrained(world / "base").device)
    samples = {s.id: s for s in first_samples(TASK, world / "datasets", "validation", ROWS)}
    assert len(records) == 5
    for record in records:
        answer = record["values"]["answers"][0]
        assert len(answer["pictures"]) == stored[record["id"]]["pictures"]
        (reply,) = ask(system, [samples[record["id"]]], 0, 0)
        for file, picture in zip(answer["pictures"], reply.pictures, strict=True):
            assert np.array_equal(pixels(output / file), np.asarray(enlarged(picture)))
    assert sum(len(r["values"]["answers"][0]["pictures"]) for r in records) > 0
    change(answered / shown / TASK, [{"text": "another answer"}] * ROWS)
    _, records = mine(world, answered, "--first", shown)
    for record in records:
        answer = record["values"]["answers"][0]
        had = stored[record["id"]]["pictures"] > 0
        assert answer["redraw_error"].startswith("asked again, ") == had
        assert answer["pictures"] == []


def test_pictures_of_an_earlier_run_go_and_other_files_stay(world: Path, answered: Path) -> None:
    output, many = mine(world, answered, "--per_task", "9")
    before = {file.name for file in (output / "pictures").iterdir()}
    for name in ("mine.png", f"{TASK}-only_first.png", f"{TASK}-only_first-1-problem-1.txt"):
        (output / "pictures" / name).touch()
    (output / "pictures" / f"{OTHER}-only_second-3-thinkmorph-2.png").touch()
    _, few = mine(world, answered, "--per_task", "1")
    named = {
        Path(file).name
        for values in (record["values"] for record in few)
        for files in (
            values["problem"],
            values["visual_thoughts"],
            *(answer["pictures"] for answer in values["answers"]),
        )
        for file in files
    }
    kept = {"mine.png", f"{TASK}-only_first.png", f"{TASK}-only_first-1-problem-1.txt"}
    assert {file.name for file in (output / "pictures").iterdir()} == named | kept
    assert len(few) < len(many) and named < before


def test_failed_answers_are_no_cases(world: Path, answered: Path, capsys) -> None:
    failed = {"finish": "error", "text": "", "correct": False, "pictures": 0}
    change(answered / "thinkmorph" / TASK, [{}, failed, {}, {}, {}, {}])
    change(answered / "opsd" / TASK, [{}, {}, failed, {}, {}, failed])
    ids = [record["id"] for record in read_records(answered / "opsd" / TASK / PREDICTIONS)]
    capsys.readouterr()
    output, records = mine(world, answered)
    found = [(r["values"]["case"], r["id"], r["values"]["total"]) for r in records]
    assert found == [
        ("only_second", ids[3], 1),
        ("only_first", ids[0], 2),
        ("only_first", ids[4], 2),
    ]
    assert {record["values"]["failed"] for record in records} == {3}
    line = f"Left out, since a system failed to answer: 3 of {TASK}."
    assert line in capsys.readouterr().out and line in (output / "cases.md").read_text()


def test_answers_of_another_protocol_are_refused(world: Path, answered: Path, capsys) -> None:
    file = answered / "opsd" / "scores.json"
    records = read_records(file)
    for record in records:
        record["values"]["protocol_hash"] = "f" * 12
    write_records(file, records)
    with pytest.raises(SystemExit):
        mine(world, answered)
    assert "opsd under short (ffffffffffff)" in capsys.readouterr().err


def test_what_is_not_drawn_again_is_said_so(world: Path, answered: Path, capsys) -> None:
    change(answered / "thinkmorph" / TASK, [{"text": "another answer"}] * ROWS)
    output, records = mine(world, answered)
    for record in records:
        answer = record["values"]["answers"][0]
        assert answer["pictures"] == [] and answer["text"] == "another answer"
        assert answer["redraw_error"].startswith("asked again, thinkmorph wrote ")
    assert f"error: {len(records)} answers could not be drawn again" in capsys.readouterr().out
    assert "Error, not drawn again" in (output / "cases.md").read_text()
    assert not list((output / "pictures").glob("*thinkmorph*"))


def test_pairs_are_written_beside_the_cases(world: Path, answered: Path) -> None:
    output, _ = mine(world, answered)
    found = {r["task"]: r["values"] for r in read_records(output / "pairs.json")}
    assert list(found) == [TASK, OTHER, "overall"]
    counts = ("both", "only_first", "only_second", "neither")
    assert [found[TASK][name] for name in counts] == [1, 3, 2, 0]
    assert [found["overall"][name] for name in counts] == [1 + ROWS, 3, 2, 0]


def test_other_data_weights_and_questions_are_refused(
    world: Path, answered: Path, tmp_path: Path, capsys
) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            mine(world, answered, *words)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    for task in (TASK, OTHER):
        data = tmp_path / "fresh" / task / "data"
        write_shards(data, task, "validation", ROWS, seed=5, shards=range(1))
    assert "was asked the file" in refused("--data_root", str(tmp_path / "fresh"))
    change(answered / "thinkmorph" / TASK, [{"prompt_hash": "x"}] * ROWS)
    assert "thinkmorph was asked another question" in refused()
    assert "--first and --second are both opsd" in refused("--first", "opsd")
    assert "nobody: not among" in refused("--second", "nobody")
    assert "--per_task must be at least 1, got 0" in refused("--per_task", "0")


def test_replaced_weights_are_refused(world: Path, answered: Path, capsys) -> None:
    file = answered / "thinkmorph" / TASK / SETTINGS
    known = json.loads(file.read_text())
    known["settings"]["weights"] = "0" * 12
    file.write_text(json.dumps(known))
    with pytest.raises(SystemExit):
        mine(world, answered)
    assert "has other weights than when thinkmorph was asked" in capsys.readouterr().err


def test_tiny_pictures_keep_their_pixels() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (30, 56, 3), dtype=np.uint8)
    found = np.asarray(enlarged(PIL.Image.fromarray(colours)))
    assert found.shape == (120, 224, 3) and np.array_equal(found[::4, ::4], colours)
    assert np.array_equal(found, colours.repeat(4, 0).repeat(4, 1))
    large = PIL.Image.new("RGB", (400, 300))
    assert enlarged(large) is large


def test_fences_hold_whatever_is_in_them() -> None:
    assert fenced("a") == ["```text", "a", "```"]
    assert fenced("x ```` y")[0] == "`````text" and fenced("x ```` y")[-1] == "`````"
