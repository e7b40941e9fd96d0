"""Thinking in pictures against text alone: the table is a function of scores and paired seconds."""

import dataclasses
import json
import re
from statistics import median

import PIL.Image
import pytest

from data.example import Example
from eval import drawings, interleaved
from eval.interleaved import BASE, DRAWN, GUIDED, Timing, accuracies, table_rows, timings
from eval.sample import Question, Reply, Sample
from tests.training import drawing_base
from train.records import read_records

PICTURE = PIL.Image.new("RGB", (8, 8))


def sample(number: int, task: str = "Chart_Refocus") -> Sample:
    example = Example(task, str(number), task, "q", "4", PICTURE)
    return Sample(task, str(number), (PICTURE, "q"), Question("match", "4"), example=example)


def system(correct, seconds, tokens=5, pictures=0):
    """Answers a batch with given results per sample number."""

    def answer(batch):
        return [
            Reply(
                f"<answer>{4 if correct(int(s.id)) else 5}</answer>", tokens, "stop",
                seconds(int(s.id)), pictures=(PICTURE,) * pictures,
            )
            for s in batch
        ]  # fmt: skip

    return answer


def test_table_is_accuracy_and_medians_of_paired_ratios():
    tasks = [[sample(i, "a") for i in range(4)], [sample(i, "b") for i in range(4, 8)]]
    systems = {
        DRAWN: system(lambda i: i < 6, lambda i: 2.0 * (i + 1), tokens=9, pictures=1),
        BASE: system(lambda i: i < 2, lambda i: 0.5 * (i + 1)),
    }
    scores = accuracies(systems, tasks, batch_size=3)
    times = timings(systems, [tasks[0][1], tasks[0][2], tasks[1][3]], repeats=2)
    rows = table_rows(scores, times)
    assert rows[DRAWN]["accuracy"] == pytest.approx(0.75) and rows[DRAWN]["pictures"] == 1
    assert rows[BASE]["accuracy"] == pytest.approx(0.25) and rows[BASE]["tokens"] == 5
    assert rows[DRAWN]["seconds"] == pytest.approx(6.0)  # of samples 1, 2 and 7
    assert rows[DRAWN]["ratio"] == pytest.approx(4.0) and rows[BASE]["ratio"] == 1.0
    assert rows[DRAWN]["n"] == 8


def test_ratio_is_that_of_each_sample_not_of_the_medians():
    seconds = [{"slow": [1.0], "fast": [1.0]}, {"slow": [8.0], "fast": [2.0]}]
    seconds.append({"slow": [9.0], "fast": [9.0]})
    times = [Timing(sample(i), row) for i, row in enumerate(seconds)]
    names = ["n", "accuracy", "low", "high", "mean_tokens", "mean_pictures"]
    overall = dict.fromkeys([*names, "picture_width", "picture_height"], 0.5)
    rows = table_rows({name: {"overall": overall} for name in ("slow", "fast")}, times)
    assert rows["slow"]["ratio"] == 1.0  # 8 / 2 would be 4
    assert rows["slow"]["seconds"] == median([1.0, 8.0, 9.0])


def test_systems_take_turns_on_each_sample():
    order = []
    systems = {
        name: lambda batch, name=name: (
            order.append((name, batch[0].id)) or system(lambda i: True, lambda i: 1.0)(batch)
        )
        for name in (DRAWN, BASE)
    }
    timings(systems, [sample(0), sample(1)], repeats=2)
    once = [(name, number) for number in "01" for name in (DRAWN, BASE)]
    assert order == [(DRAWN, "0"), (BASE, "0"), *once, *once]  # a warm-up first


@pytest.fixture(scope="module")
def drawing_world():
    """`drawing/` draws, `base/` does not; `datasets/` has rows for both."""
    return drawing_base().parent


@pytest.fixture
def arguments(drawing_world):
    return [
        "--model_path", str(drawing_world / "drawing"),
        "--data_root", str(drawing_world / "datasets"),
        "--dataset_config_file", "data/configs/mini_opsd.yaml", "--split", "validation",
        "--max_new_tokens", "6", "--num_timesteps", "3", "--device", "cpu", "--max_rounds", "1",
    ]  # fmt: skip


def test_command_writes_table_and_records(arguments, drawing_world, tmp_path, capsys):
    base = str(drawing_world / "base")
    extra = ["--student_path", base, f"other={base}", "--limit_per_task", "2"]
    extra += ["--latency_samples", "1", "--repeats", "2", "--batch_size", "2"]
    interleaved.main([*arguments, *extra, "--output_dir", str(tmp_path)])
    names = [GUIDED, DRAWN, BASE, "student, text-only", "other, text-only"]
    text = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:7]] == names
    assert re.search(r"Command: `.+`, seed 0, commit ", text)
    rows = read_records(tmp_path / "table.json")
    assert [row["id"] for row in rows] == names and rows[-1]["values"]["ratio"] == 1.0
    assert rows[0]["values"]["pictures"] > 0 == rows[2]["values"]["pictures"]
    drawn = rows[1]["values"]
    assert drawn["picture_width"] > 0 == rows[2]["values"]["picture_width"]
    assert drawn["drawing"]["num_timesteps"] == 3 and drawn["drawing"]["cfg_text_scale"] == 1.0
    assert rows[0]["values"]["drawing"]["cfg_text_scale"] == 3.0
    assert rows[2]["values"]["drawing"] is None
    assert len(read_records(tmp_path / "seconds.json")) == 4
    assert {len(v) for r in read_records(tmp_path / "seconds.json") for v in r["values"].values()}
    assert len(read_records(tmp_path / "scores.json")) == 5 * 5
    assert "saved" in capsys.readouterr().out


def test_base_that_cannot_draw_is_one_line(arguments, drawing_world, tmp_path, capsys):
    words = [*arguments, "--output_dir", str(tmp_path)]
    words[1] = str(drawing_world / "base")
    with pytest.raises(SystemExit) as stopped:
        interleaved.main(words)
    assert stopped.value.code == 2
    assert "cannot draw: it has no latent heads" in capsys.readouterr().err


def test_page_shows_problem_drawing_and_truth(arguments, tmp_path):
    words = [*arguments, "--per_task", "2", "--output_dir", str(tmp_path)]
    drawings.main(words)
    with PIL.Image.open(tmp_path / "drawings.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_page_leaves_the_drawn_column_empty_where_nothing_was_drawn():
    item = sample(0)
    true = dataclasses.replace(item.example, visual_thoughts=(PIL.Image.new("RGB", (8, 8), "red"),))
    silent = Reply("no picture", 2, "stop", 1.0)
    page = drawings.page({"task": [(dataclasses.replace(item, example=true), silent)]})
    x = drawings.MARGIN + drawings.SIDE + drawings.MARGIN + drawings.SIDE // 2
    y = page.size[1] - drawings.MARGIN - drawings.SIDE // 2
    assert page.getpixel((x, y)) == (255, 255, 255)
    assert page.getpixel((x + drawings.SIDE + drawings.MARGIN, y)) == (255, 0, 0)


def test_records_are_json(arguments, tmp_path):
    interleaved.main([*arguments, "--limit_per_task", "1", "--latency_samples", "1",
                      "--repeats", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    for name in ("table.json", "scores.json", "seconds.json"):
        json.loads((tmp_path / name).read_text())
