"""Validation during training: what it measures, what it leaves, and that it changes nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval import kl_diagnostic, token_classes
from eval import run as eval_run
from modeling.tokenizer import load_tokenizer
from tests.training import (
    CONFIGS,
    PROBES,
    WORLD,
    all_lines,
    largest_difference,
    metric_lines,
    opsd_argv,
    opsd_config,
    run_opsd,
    weights_of,
    workspace,
)
from train import opsd
from train.config import parse_opsd
from train.optim import NonFiniteError
from train.records import read_records
from train.validation import OVERALL, Outcome, Validation, summarise

ROOT = Path(__file__).parents[1]
BASE = ROOT / "models" / "mini-base"  # one that gets some of the answers right
SEED = 5
FLAGS = {"total_steps": 3, "lr": 2e-3, "data_seed": SEED, "save_every": 3}
VALIDATED = {"model_path": BASE, "validate_every": 2, "validation_samples": PROBES}
SOURCES = ["--dataset_config_file", str(CONFIGS / "mini_opsd.yaml")]


def records_of(run: Path) -> list[dict]:
    return read_records(run / "results" / "validation.jsonl")


def best_of(run: Path) -> str:
    return os.readlink(run / "checkpoints" / "best")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three updates that validates at 0, 2 and, as the last one, 3."""
    folder = tmp_path_factory.mktemp("validated")
    run_opsd(folder, **FLAGS, **VALIDATED)
    return folder


def test_there_is_a_record_per_task_and_one_overall_each_time(run):
    records = records_of(run)
    assert [r["step"] for r in records] == [step for step in (0, 2, 3) for _ in range(5)]
    tasks = [r["task"] for r in records[:5]]
    assert tasks[-1] == OVERALL and len(set(tasks)) == 5
    assert {r["kind"] for r in records} == {"validation"}
    assert {r["seed"] for r in records} == {SEED}
    for step, found in ((0, records[:5]), (3, records[10:])):
        assert {r["system"] for r in found} == {"checkpoints/0000003" if step else "mini-base"}
        assert [r["values"]["n"] for r in found] == [PROBES] * 4 + [4 * PROBES]
        values = [r["values"] for r in found]
        for name in ("accuracy", "k_gen", "mean_tokens", "unparsed_rate", "budget_rate"):
            per_task = [value[name] for value in values[:-1]]
            assert values[-1][name] == pytest.approx(sum(per_task) / 4)
    base, last = records[0]["values"], records[10]["values"]
    assert base["gap_closed"] == 0
    assert last["gap_closed"] == pytest.approx(1 - last["k_gen"] / base["k_gen"])


def test_k_gen_is_that_of_the_diagnostic(run, tmp_path):
    """Of the base before the first update, of the saved student after the last one."""
    argv = ["--model_path", str(BASE), *SOURCES, "--data_root", str(workspace() / "datasets")]
    argv += ["--student_path", f"student={run / 'checkpoints' / 'latest'}", "--device", "cpu"]
    argv += ["--num_samples", str(4 * PROBES), "--seed", str(SEED), "--split", "validation"]
    kl_diagnostic.main([*argv, "--output_dir", str(tmp_path)])
    records = json.loads((tmp_path / "summary.json").read_text())
    summary = {record["task"]: record["values"] for record in records}
    for record in records_of(run):
        if record["step"] in (0, 3):
            measure = {0: "pre", 3: "post:student"}[record["step"]]
            expected = summary[record["task"]][measure]["value"]
            assert record["values"]["k_gen"] == pytest.approx(expected, rel=1e-5), record["task"]
    for step, measure in ((0, "pre"), (3, "post:student")):
        samples = token_classes.read_tokens(tmp_path, load_tokenizer(BASE), measure)
        for record in records_of(run):
            if record["step"] == step and record["task"] != OVERALL:
                rows = token_classes.shares([s for s in samples if s.task == record["task"]])
                found = {n: v for n, v in record["values"].items() if n.startswith("k_gen_of/")}
                expected = {f"k_gen_of/{name}": row["mean"] for name, row in rows.items()}
                # the diagnostic keeps six decimals of each KL_t
                assert found == pytest.approx(expected, rel=1e-5, abs=5e-7), record["task"]
                assert len(found) >= 3
    assert summary[OVERALL]["post:student"]["value"] != pytest.approx(
        summary[OVERALL]["pre"]["value"], rel=1e-3
    )


def test_accuracy_is_that_of_the_evaluation(run, tmp_path):
    """The probe set is the whole validation split here, so both see the same rows."""
    protocol = tmp_path / "short.yaml"
    protocol.write_text("{name: short, decoding: {max_new_tokens: 12}}")
    for step, path in ((0, BASE), (3, run / "checkpoints" / "latest")):
        argv = ["--systems", f"opsd={path}", "--data_root", str(workspace() / "datasets")]
        argv += ["--benchmarks", "mini", "--split", "validation", "--protocol", str(protocol)]
        eval_run.main([*argv, "--device", "cpu", "--output_dir", str(tmp_path / str(step))])
        scores = json.loads((tmp_path / str(step) / "opsd" / "scores.json").read_text())
        expected = {r["task"]: r["values"] for r in scores}
        found = {r["task"]: r["values"] for r in records_of(run) if r["step"] == step}
        assert found.keys() == expected.keys()
        for task, values in found.items():
            for name in ("accuracy", "unparsed_rate", "mean_tokens"):
                assert values[name] == pytest.approx(expected[task][name]), (task, name)
        assert 0 < found[OVERALL]["accuracy"] < 1


def test_it_changes_neither_the_run_nor_its_metrics(run, tmp_path):
    plain = run_opsd(tmp_path, **FLAGS, model_path=BASE)
    assert plain == metric_lines(run)
    assert largest_difference(weights_of(tmp_path, 3), weights_of(run, 3)) == 0
    assert not (tmp_path / "results" / "validation.jsonl").exists()
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_results_are_also_lines_of_the_metrics(run):
    lines = [line for line in all_lines(run) if "val/accuracy" in line]
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        for record in records_of(run):
            if record["step"] == line["step"]:
                end = "" if record["task"] == OVERALL else f"/{record['task']}"
                names = ["accuracy", "k_gen", "gap_closed"]
                if record["task"] == OVERALL:
                    names += [name for name in record["values"] if name.startswith("k_gen_of/")]
                for name in names:
                    assert line[f"val/{name}{end}"] == record["values"][name]
        assert "val/k_gen_of/content" in line


FRESH = ("id", "created", "command", "info", "config_hash", "hardware", "commit", "system")


def measured(run: Path) -> list[dict]:
    """The records without what depends on the launch."""
    return [{k: v for k, v in record.items() if k not in FRESH} for record in records_of(run)]


def killed(run: Path, after: int) -> None:
    """Leave what a run has written when it is killed after that update, before it validates."""
    folder = run / "checkpoints"
    for path in folder.glob("*0*"):
        if int(path.name.removeprefix("best-")) > after:
            shutil.rmtree(path)
    for link in ("latest", "best"):
        (folder / link).unlink()
    kept = [r for r in records_of(run) if r["step"] < after]
    (run / "results" / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_has_the_records_of_the_uninterrupted_one(run, tmp_path, after):
    flags = {**FLAGS, **VALIDATED, "save_every": 1}
    run_opsd(tmp_path, **flags)
    first = records_of(tmp_path)[:5]
    killed(tmp_path, after)
    lines = run_opsd(tmp_path, **flags, resume="latest")
    assert measured(tmp_path) == measured(run)
    assert records_of(tmp_path)[:5] == first  # what was measured then is not measured again
    assert lines == metric_lines(run)
    steps = [line["step"] for line in all_lines(tmp_path)]
    assert steps == [1, 2, 2, 3, 3]
    assert best_of(tmp_path).removeprefix("best-") == best_of(run).removeprefix("best-")


@pytest.mark.parametrize("saved", [4, 2])
def test_a_run_that_was_killed_after_its_best_goes_on(tmp_path, saved):
    """Killed at update 3; the best, at 1, and the one at 3 were not due."""
    flags = {**FLAGS, **VALIDATED, "total_steps": 4, "validate_every": 1, "save_every": saved}
    run_opsd(tmp_path / "whole", **flags)
    run_opsd(tmp_path / "part", **flags)
    for name in ("0000004", "best-0000004"):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / name, ignore_errors=True)
    run_opsd(tmp_path / "part", **flags, resume="auto")
    assert measured(tmp_path / "part") == measured(tmp_path / "whole")
    assert best_of(tmp_path / "part") == best_of(tmp_path / "whole")
    ends = [weights_of(tmp_path / name, 4) for name in ("whole", "part")]
    assert largest_difference(*ends) == 0


def test_the_best_so_far_outlives_another_results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "_outcomes", canned)
    flags = {"total_steps": 5, "save_every": 1, "validate_every": 1, "validation_samples": 1}
    run_opsd(tmp_path, **flags)
    shutil.rmtree(tmp_path / "checkpoints" / "0000005")
    elsewhere = {"results_dir": tmp_path / "elsewhere", "resume": "latest"}
    opsd.train(opsd_config(tmp_path, **flags, **elsewhere), WORLD)
    assert best_of(tmp_path) == "0000003"
    found = read_records(tmp_path / "elsewhere" / "validation.jsonl")
    assert [r["values"] for r in found] == [r["values"] for r in records_of(tmp_path)]


def test_other_rows_begin_anew(run, tmp_path, capsys):
    """Also where there was no validation: a resumed run may switch it on, with any size."""
    flags = {**FLAGS, "model_path": BASE, "save_every": 1}
    run_opsd(tmp_path, **flags)
    for step in (2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / f"000000{step}")
    on = {**flags, **VALIDATED, "total_steps": 3, "resume": "latest"}
    run_opsd(tmp_path, **on)
    assert "on other rows" not in capsys.readouterr().out  # there were none
    assert [r["values"] for r in records_of(tmp_path)] == [r["values"] for r in records_of(run)]
    shutil.rmtree(tmp_path / "checkpoints" / "0000003")
    (tmp_path / "checkpoints" / "best").unlink()
    capsys.readouterr()
    run_opsd(tmp_path, **{**on, "validation_samples": 1})
    assert (
        "the validations of the run that is resumed were on other rows" in capsys.readouterr().out
    )
    assert [r["step"] for r in records_of(tmp_path)] == [
        step for step in (0, 2, 3) for _ in range(5)
    ]
    assert {r["values"]["n"] for r in records_of(tmp_path)} == {1, 4}


CANNED = {1: (0.5, 0.3), 2: (0.7, 0.2), 3: (0.7, 0.1), 4: (0.7, 0.1), 5: (0.6, 0.0)}


def canned(validation):
    """Outcomes by the number of validations so far."""
    accuracy, k_gen = CANNED.get(len(validation.scores), (0.0, 1.0))
    yield outcome(0, "a", accuracy, k_gen)


def test_the_best_is_kept(tmp_path, monkeypatch):
    """Highest accuracy, then lowest K_gen, then the earlier one."""
    monkeypatch.setattr(Validation, "_outcomes", canned)
    flags = {"total_steps": 5, "save_every": 2, "keep_last": 1}
    run_opsd(tmp_path, **flags, validate_every=1, validation_samples=1)
    assert best_of(tmp_path) == "best-0000003"
    folder = tmp_path / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000005", "best", "best-0000003", "latest"]
    assert json.loads((folder / "best" / "run.json").read_text())["step"] == 3
    assert largest_difference(weights_of(folder / "best"), weights_of(tmp_path, 5)) > 0
    assert not (folder / "best" / "state").exists()
    assert (folder / "latest" / "state").is_dir()


def test_a_k_gen_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(CANNED, 1, (0.5, float("nan")))
    monkeypatch.setattr(Validation, "_outcomes", canned)
    with pytest.raises(NonFiniteError, match="step 1: k_gen/a=nan"):
        run_opsd(tmp_path, total_steps=2, validate_every=1, validation_samples=1)


def test_records_of_an_earlier_run_do_not_stay(tmp_path):
    flags = {"model_path": BASE, "total_steps": 1, "overwrite": True}
    run_opsd(tmp_path, **flags, validate_every=1, validation_samples=1)
    run_opsd(tmp_path, **flags, validate_every=1, validation_samples=1, data_seed=SEED)
    assert {r["seed"] for r in records_of(tmp_path)} == {SEED}
    run_opsd(tmp_path, **flags)
    assert not (tmp_path / "results" / "validation.jsonl").exists()


def outcome(index, task, accuracy, k_gen):
    by_class = {"tag": [k_gen]}
    return Outcome(index, task, accuracy, 1 - accuracy, 0.0, 10.0 * (index + 1), k_gen, by_class)


def test_every_task_counts_the_same():
    rows = [outcome(0, "a", 1.0, 0.4), outcome(1, "b", 0.0, 0.1), outcome(2, "b", 0.0, 0.3)]
    scores = summarise(rows)
    assert scores["b"]["n"] == 2 and scores["b"]["k_gen"] == pytest.approx(0.2)
    assert scores[OVERALL]["n"] == 3
    assert scores[OVERALL]["accuracy"] == 0.5
    assert scores[OVERALL]["k_gen"] == pytest.approx(0.3)
    assert scores[OVERALL]["mean_tokens"] == (10 + 25) / 2


def test_classes_are_means_over_tokens_then_over_the_tasks_that_have_them():
    rows = [
        dataclasses.replace(outcome(0, "a", 1.0, 0.4), of_class={"tag": [1.0], "number": [5.0]}),
        dataclasses.replace(outcome(1, "a", 1.0, 0.4), of_class={"tag": [2.0, 6.0]}),
        dataclasses.replace(outcome(2, "b", 1.0, 0.4), of_class={"tag": [7.0]}),
    ]
    scores = summarise(rows)
    found = {task: {n: v for n, v in s.items() if "/" in n} for task, s in scores.items()}
    assert found["a"] == {"k_gen_of/tag": 3.0, "k_gen_of/number": 5.0}
    assert found["b"] == {"k_gen_of/tag": 7.0}
    assert found[OVERALL] == {"k_gen_of/tag": 5.0, "k_gen_of/number": 5.0}


# ---- what cannot be validated -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validate_every": -1}, "--validate_every must be 0 (none) or more: -1"),
        ({"validation_samples": 0}, "--validation_samples must be 1 or more: 0"),
    ],
)
def test_flags_out_of_range_are_named(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_opsd(opsd_argv(tmp_path, **flags))
    assert message in capsys.readouterr().err


def checked(folder: Path, **flags) -> str:
    """What the check before a launch says; it refuses."""
    command = [sys.executable, "-m", "train.check", "opsd", *opsd_argv(folder, **flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    return result.stderr


def test_too_few_rows_are_found_before_the_launch(tmp_path):
    said = checked(tmp_path, validate_every=1, validation_samples=PROBES + 1)
    assert f"--validation_samples {PROBES + 1}, but Visual_Search has {PROBES}" in said


def test_a_missing_split_is_found_before_the_launch(tmp_path):
    shutil.copytree(workspace() / "datasets", tmp_path / "datasets")
    for file in (tmp_path / "datasets").rglob("*validation*"):
        file.unlink()
    said = checked(tmp_path, data_root=tmp_path / "datasets", validate_every=1)
    assert "--validate_every needs a validation split: no file matches" in said
    assert "give it a name with 'validation' in the place of 'train'" in said
