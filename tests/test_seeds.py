"""The table over seeds: mean and spread of what the summaries say, and of nothing else."""

import copy
import json
import statistics

import pytest

from eval.seeds import load, main, write_seeds
from eval.summary import ACCURACY, ARMS, DIAGNOSTICS
from train.config import UsageError

TASKS = ("Visual_Search", "Chart_Refocus", "overall")
OPSD = (0.8, 0.9, 0.7)


def summary(seed, opsd):
    """What eval.summary writes, with one accuracy that depends on the seed."""
    estimate = {"value": 0.2 + 0.01 * seed, "low": 0.1, "high": 0.3}
    diagnostic = {
        "n": 100,
        "k_base": estimate,
        "k_after": dict.fromkeys(ARMS, estimate),
        "gap_closed": {"opsd": {"value": opsd - 0.1}, "noise": {"value": -0.05 * seed}},
    }
    share = {"n": 500, "accuracy": 0.4, "low": 0.3, "high": 0.5}
    row = {
        "accuracy": {arm: share | {"accuracy": opsd if arm == "opsd" else 0.4} for arm in ACCURACY},
        **dict.fromkeys(DIAGNOSTICS, diagnostic),
    }
    gains = {"above_base": 100 * opsd - 40, "above_noise": 100 * opsd - 40}
    return {
        "seed": seed,
        "files": {"f": {"commit": f"commit{seed // 2}"}},
        "tasks": {task: copy.deepcopy(row) for task in TASKS},
        "effect": dict.fromkeys(TASKS, gains),
    }


@pytest.fixture
def folders(tmp_path):
    folders = []
    for seed, opsd in enumerate(OPSD):
        folders.append(tmp_path / f"seed{seed}")
        folders[-1].mkdir()
        (folders[-1] / "summary.json").write_text(json.dumps(summary(seed, opsd)))
    return folders


def test_mean_and_spread_are_those_of_the_seeds(folders, tmp_path):
    merged = write_seeds(folders, tmp_path)
    opsd = merged["tasks"]["Chart_Refocus"]["accuracy"]["opsd"]
    assert opsd["seeds"] == list(OPSD)
    assert opsd["accuracy"] == opsd["value"] == pytest.approx(0.8)
    assert opsd["sd"] == pytest.approx(statistics.stdev(OPSD))
    assert (opsd["low"], opsd["high"]) == (0.7, 0.9)
    row = merged["tasks"]["overall"]
    assert row["gap_sample"]["gap_closed"]["opsd"]["value"] == pytest.approx(0.7)
    assert row["gap_dataset"]["k_base"]["seeds"] == pytest.approx([0.2, 0.21, 0.22])
    assert row["effect"]["above_noise"]["value"] == pytest.approx(40)
    assert merged["commits"] == ["commit0", "commit1"]
    assert json.loads((tmp_path / "seeds.json").read_text()) == merged
    assert (tmp_path / "seeds.png").read_bytes()[:4] == b"\x89PNG"


def test_table_shows_mean_spread_and_every_seed(folders, tmp_path):
    write_seeds(folders, tmp_path)
    lines = (tmp_path / "seeds.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    overall = [row for row in cells if row[0] == "overall"]
    assert overall[0] == [
        "overall", "40.0 ± 0.0", "80.0 ± 10.0", "40.0 ± 0.0", "40.0 ± 0.0", "40.0 ± 0.0",
        "40.0 ± 10.0", "40.0 ± 10.0",
    ]  # fmt: skip
    assert overall[1] == [
        "overall", "0.210 ± 0.010", "70.0 ± 10.0", "-5.0 ± 5.0", "70.0 ± 10.0", "-5.0 ± 5.0"
    ]  # fmt: skip
    assert [row for row in cells if row[0] == "seed 1"] == [
        ["seed 1", "40.0", "90.0", "40.0", "40.0", "40.0"]
    ]


def test_what_cannot_be_merged_is_named(folders, capsys):
    with pytest.raises(UsageError, match="at least two folders, got 1"):
        load(folders[:1])
    with pytest.raises(UsageError, match=r"seeds \[0, 0\]"):
        load([folders[0], folders[0]])
    other = summary(5, 0.5)
    del other["tasks"]["Chart_Refocus"]
    (folders[1] / "summary.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"seed1 has tasks \['Visual_Search', 'overall'\]"):
        load(folders)
    (folders[2] / "summary.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main([str(folder) for folder in folders])
    assert stop.value.code == 2
    assert "seed2/summary.json is missing" in capsys.readouterr().err
