"""The quickstart's table is a function of result files: right numbers in the right cells."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.text import Text

from eval.quickstart_figure import quickstart_figure
from eval.summary import (
    ACCURACY,
    ARMS,
    CONTROL_MEASURES,
    DIAGNOSTICS,
    collect,
    effect,
    main,
    write_summary,
)
from train.config import UsageError
from train.records import base_record, read_records, write_records

TASKS = ("Visual_Search", "Chart_Refocus", "Spatial_Navigation", "Jigsaw_Assembly", "overall")
SHARES = {"base": 0.3, "noise": 0.25, "opsd": 0.9, "base_vt": 0.95, "base_noise_vt": 0.28}
SYSTEM = {"n": 200, "accuracy": 0.625, "low": 0.6, "high": 0.7, "tokens": 17.5, "pictures": 1.0}


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
                        "unusable_rows": 0,
                        "pre": estimate(k),
                        **{m: estimate(k + 1 + i) for i, m in enumerate(CONTROL_MEASURES)},
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
                    "unusable_rows": 0,
                    "seconds_per_sample": 0.002,
                },
            )
            for place, task in enumerate(TASKS)
        ]
        write_records(tmp_path / "accuracy" / name / "scores.json", rows)
    systems = [
        record("interleaved", "overall", SYSTEM | {"seconds": seconds, "ratio": seconds / 0.25})
        | {"id": name}
        for name, seconds in (("draws", 3.0), ("writes", 0.25))
    ]
    write_records(tmp_path / "interleaved" / "table.json", systems)
    return tmp_path


def training(arm):
    return {"command": f"train {arm}", "step": 350, "seed": 3, "commit": "abc"}


@pytest.fixture
def checkpoints(tmp_path):
    """What the two trainings left about themselves."""
    for arm in ARMS:
        folder = tmp_path / "checkpoints" / arm / "latest"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(training(arm)))
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
        assert saved["files"][file] == training(arm)
    text = (results / "summary.md").read_text()
    assert "`train noise`" in text
    shown = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert ["system", "accuracy, %", "tokens", "pictures", "seconds", "times writes"] in shown
    assert ["draws", "62.5 (60 .. 70)", "17.5", "1.00", "3.0000", "12.0"] in shown
    assert summary["interleaved"]["writes"]["ratio"] == 1.0
    assert f"commit abc, {summary['commit']}." in text  # of the trainings and of this process
    accuracies, gaps, controls = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| Chart_Refocus")
    )
    low_high = "(20 .. 100)"
    shares = ("31.0", "91.0", "26.0", "96.0", "29.0")  # in the order of the header
    place = TASKS.index("Chart_Refocus")
    k = 0.5 + 0.1 * place
    assert controls == ["Chart_Refocus", *(f"{k + i:.3f}" for i in range(7))]
    assert accuracies == ["Chart_Refocus", *(f"{share} {low_high}" for share in shares)]
    assert gaps == [
        "Chart_Refocus",
        "0.600 (0.590 .. 0.610)",
        "90 % (89 .. 91)",
        "-10 % (-11 .. -9)",
    ]
    [header] = [line for line in text.splitlines() if "text-only" in line and line[0] == "|"]
    assert [title in header for title in ACCURACY.values()] == [True] * 5
    assert "unusable" not in text
    assert (results / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_unusable_rows_are_mentioned(results, checkpoints):
    file = results / "accuracy" / "base_vt" / "scores.json"
    rows = read_records(file)
    rows[-1]["values"]["unusable_rows"] = 3
    write_records(file, rows)
    write_summary(results, checkpoints, seed=3)
    assert "3 unusable rows were passed over" in (results / "summary.md").read_text()


def test_files_of_another_seed_are_refused(results, checkpoints):
    file = checkpoints / "noise" / "latest" / "run.json"
    file.write_text(json.dumps(training("noise") | {"seed": 4}))
    with pytest.raises(UsageError, match=r"noise/latest/run\.json is of seed 4, --seed says 3"):
        write_summary(results, checkpoints, seed=3)


@pytest.fixture
def figure(results, checkpoints):
    figure = quickstart_figure(write_summary(results, checkpoints, 3), ACCURACY, "title", "95 %")
    FigureCanvasAgg(figure).draw()
    return figure


def drawn(axis):
    """Heights of the bars by arm, and both ends of all whiskers."""
    bars = [c for c in axis.containers if isinstance(c, BarContainer)]
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in bars}
    lines = [c.lines[2][0] for c in axis.containers if not isinstance(c, BarContainer)]
    return heights, [segment[:, 1] for line in lines for segment in line.get_segments()]


def test_bars_are_the_numbers(figure):
    accuracy, gap = figure.axes
    heights, whiskers = drawn(accuracy)
    for name, title in ACCURACY.items():
        expected = [100 * (SHARES[name] + 0.01 * place) for place in range(5)]
        assert heights[title] == pytest.approx(expected)
    assert np.array(whiskers) == pytest.approx(np.tile([20.0, 100.0], (25, 1)))
    heights, whiskers = drawn(gap)
    before, opsd, noise = heights.values()
    assert np.array(whiskers[:3]) == pytest.approx(
        np.array([[0.49, 0.51], [0.59, 0.61], [0.69, 0.71]])
    )
    assert before == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert opsd == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09])
    assert noise == pytest.approx([0.55, 0.66, 0.77, 0.88, 0.99])
    assert "OPSD closed 90 %\nnoise closed -10 %" in gap.get_xticklabels()[1].get_text()
    assert "500" in accuracy.get_title("left") and "10 test texts" in gap.get_title("left")


def test_texts_of_the_figure_do_not_overlap(figure):
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    clashes = [
        (texts[i].get_text(), texts[j].get_text())
        for i in range(len(boxes))
        for j in range(i)
        if boxes[i].overlaps(boxes[j])
    ]
    assert not clashes
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


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
