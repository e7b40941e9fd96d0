"""The quickstart's table is a function of result files: right numbers in the right cells."""

import json

import pytest

from eval.report import ACCURACY, ARMS, DIAGNOSTICS, collect, effect, main, write_summary
from train.config import UsageError
from train.records import base_record, write_records

TASKS = ("Visual_Search", "Chart_Refocus", "overall")
SHARES = {"base": 0.3, "noise": 0.25, "opsd": 0.9, "base_vt": 0.98, "base_noise_vt": 0.28}


def estimate(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def record(kind, task, values):
    return base_record(
        kind=kind, system="x", task=task, id="i", values=values, seed=3, step=7, config_hash="c"
    )


@pytest.fixture
def results(tmp_path):
    """Result files of a run whose numbers differ from cell to cell."""
    for number, name in enumerate(DIAGNOSTICS):
        rows = []
        for place, task in enumerate(TASKS):
            k = 0.5 + 0.1 * place + number
            rows.append(
                record(
                    "kl_diagnostic",
                    task,
                    {
                        "n": 10,
                        "pre": estimate(k),
                        "noise_vt": estimate(k + 1),
                        "prompts_only": estimate(k + 2),
                        "post:opsd": estimate(k / 10),
                        "post:noise": estimate(k * 1.1),
                        "gap_closed": {"opsd": estimate(0.9), "noise": estimate(-0.1)},
                    },
                )
            )
        write_records(tmp_path / name / "summary.json", rows)
    for name in ACCURACY:
        rows = [
            record(
                "accuracy",
                task,
                {
                    "n": 500,
                    "accuracy": SHARES[name] + 0.01 * place,
                    "low": 0.2,
                    "high": 1.0,
                    "unparsed_rate": 0.0,
                    "seconds_per_sample": 0.002,
                },
            )
            for place, task in enumerate(TASKS)
        ]
        write_records(tmp_path / "accuracy" / name / "scores.json", rows)
    return tmp_path


@pytest.fixture
def checkpoints(tmp_path):
    """What the two trainings left about themselves."""
    for arm in ARMS:
        folder = tmp_path / "checkpoints" / arm / "latest"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"command": f"train {arm}", "step": 350}))
    return tmp_path / "checkpoints"


def test_cells_come_from_their_files(results):
    tasks = collect(results)["tasks"]
    assert list(tasks) == list(TASKS)
    chart = tasks["Chart_Refocus"]
    assert chart["gap_dataset"]["k_base"]["value"] == pytest.approx(0.6)
    assert chart["gap_sample"]["k_base"]["value"] == pytest.approx(1.6)
    assert chart["gap_dataset"]["k_after"]["opsd"]["value"] == pytest.approx(0.06)
    assert chart["accuracy"]["noise"]["accuracy"] == pytest.approx(0.26)


def test_effect_is_in_points_above_base_and_noise(results):
    gains = effect(collect(results)["tasks"])
    assert gains["overall"]["above_base"] == pytest.approx(60.0)
    assert gains["overall"]["above_noise"] == pytest.approx(65.0)


def test_summary_files_name_their_origin(results, checkpoints):
    summary = write_summary(results, checkpoints, seed=3)
    saved = json.loads((results / "summary.json").read_text())
    assert saved["effect"] == summary["effect"] and saved["seed"] == 3
    origin = saved["files"]["accuracy/opsd/scores.json"]
    assert origin["seed"] == 3 and origin["step"] == 7 and origin["command"]
    for arm in ARMS:
        file = str(checkpoints / arm / "latest" / "run.json")
        assert saved["files"][file] == {"command": f"train {arm}", "step": 350}
    text = (results / "summary.md").read_text()
    assert "`train noise`" in text
    row = next(line for line in text.splitlines() if line.startswith("| Chart_Refocus"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "Chart_Refocus", "0.600", "90 %", "-10 %", "31.0", "26.0", "91.0", "99.0", "29.0"
    ]  # fmt: skip
    assert (results / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_checkpoint_is_named(results, checkpoints):
    (checkpoints / "noise" / "latest" / "run.json").unlink()
    with pytest.raises(UsageError, match=r"noise/latest/run\.json is missing"):
        write_summary(results, checkpoints, seed=3)


def test_missing_file_is_named(results, checkpoints, capsys):
    (results / "accuracy" / "noise" / "scores.json").unlink()
    with pytest.raises(UsageError, match=r"accuracy/noise/scores\.json is missing"):
        collect(results)
    with pytest.raises(SystemExit) as stop:
        main(["--results_dir", str(results), "--checkpoint_dir", str(checkpoints)])
    assert stop.value.code == 2
    assert "scores.json is missing" in capsys.readouterr().err
