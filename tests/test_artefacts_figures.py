"""What the figures and cases of the report show, from invented results."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from data.miniworld.world import TASKS
from eval.artefacts import pictures
from eval.artefacts.model import Artefact, Measured, Number, Picture, Text
from eval.statistics import mcnemar
from tests.invented_results import (
    CLASSES,
    COLUMN_TASKS,
    FILES,
    IN_KL,
    LAYERS,
    OVERALL,
    PILOT,
    PLAN,
    SEEDS,
    SETTINGS,
    STEPS,
    TITLES,
    Raw,
    Want,
    accuracy,
    by_seed,
    chosen_step,
    collected,
    drawn_figure,
    kl,
    made,
    minus,
    origin,
    pick,
    raw,
    runs_of,
    same,
    shown,
    single,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Invented results; tests that change them put them back."""
    return made(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    return collected(folder)


def named_bars(figure: Figure) -> dict[str, float]:
    """Name beside a bar -> its length, in the order of the picture."""
    (axis,) = figure.axes
    names = dict(zip(axis.get_yticks(), axis.get_yticklabels(), strict=True))
    bars = [bar for container in axis.containers for bar in container]
    by_place = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in bars}
    return {
        names[min(names, key=lambda tick: abs(tick - place))].get_text().replace("\n", " "): width
        for place, width in sorted(by_place.items())
    }


@pytest.mark.parametrize(
    "build, place, name, other",
    [(pictures.figure1, 1, "figure1b", "thinkmorph"), (pictures.figure7, 0, "figure7a", "sft")],
)
def test_gains_are_differences_of_the_two_systems(folder, build, place, name, other):
    picture = build(runs_of(folder))[place]
    wanted = {t: minus("opsd", other, k) for t, k in zip(TITLES, COLUMN_TASKS, strict=True)}
    found = named_bars(drawn_figure(picture))
    assert found == pytest.approx({title: want.value for title, want in wanted.items()})
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert picture.name == name
    assert set(picture.sources) == frozenset().union(*(want.sources for want in wanted.values()))


def test_interventions_have_the_bars_of_their_systems(folder):
    picture = pictures.figure3a(runs_of(folder))
    (axis,) = drawn_figure(picture).axes
    ticks = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    assert ticks == list(TITLES)
    found = {c.get_label(): [bar.get_width() for bar in c] for c in axis.containers}
    assert list(found) == list(PILOT)
    for title, (where, system) in PILOT.items():
        wanted = [by_seed(system, task, where) for task in COLUMN_TASKS]
        assert found[title] == pytest.approx([want.value for want in wanted])
        assert set().union(*(want.sources for want in wanted)) <= set(picture.sources)
    assert {s.file.split("/")[2] for s in picture.sources} == {s for _, s in PILOT.values()}


def test_wins_and_losses_are_the_shares_of_all_seeds(folder):
    picture = pictures.figure5(runs_of(folder))
    (axis,) = drawn_figure(picture).axes
    widths = [bar.get_width() for container in axis.containers for bar in container]
    ticks = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    assert ticks == list(TITLES[:4])
    wanted, notes = [], []
    for task in TASKS:
        records = [pick(f"seed{s}/pairs.json", task, id="opsd:thinkmorph") for s in SEEDS]
        names = ("both", "only_first", "only_second", "neither")
        counts = [sum(record["values"][name] for record in records) for name in names]
        wanted += [100 * n / sum(counts) for n in counts]
        p = mcnemar(counts[1], counts[2])
        notes.append(f"n = {sum(counts)}; {counts[1]} wins, {counts[2]} losses; p = {p:.2g}")
    assert widths == pytest.approx(wanted)
    assert [text.get_text() for text in axis.texts if "n = " in text.get_text()] == notes
    assert {source.file for source in picture.sources} == {f"seed{s}/pairs.json" for s in SEEDS}


def test_attention_lines_are_the_layers_of_their_mode_in_order(folder):
    picture = pictures.figure3b(runs_of(folder))
    parts = {
        "visual thought": "img1", "problem image": "img0", "question": "question",
        "system prompt": "system", "first text": "txt0", "its own text so far": "txt1",
        "marks around pictures": "marks",
    }  # fmt: skip
    modes = {"its own drawing": "drawn", "noise": "noise", "another problem's VT": "shuffled"}
    panels = {axis.get_title(loc="left"): axis for axis in drawn_figure(picture).axes}
    assert list(panels) == list(modes)
    file = "attention/attention.json"
    for title, mode in modes.items():
        lines = {line.get_label(): line for line in panels[title].get_lines()}
        for part, key in parts.items():
            wanted = [raw(file, key, id=f"{mode}/txt1/{layer:02}").value for layer in range(LAYERS)]
            assert list(lines[part].get_ydata()) == pytest.approx(wanted)
            assert list(lines[part].get_xdata()) == [1, 2, 3, 4]
        even = raw(file, "uniform", "img1", id=f"{mode}/txt1/00").value
        assert lines["uniform visual thought"].get_ydata()[0] == even
    assert {source.file for source in picture.sources} == {file}


def test_attention_of_the_pictures_has_the_intervals_of_the_file(whole):
    ((curves, _), named) = whole[1]["attention_by_layer"][0]
    for key, part in (("img1", "visual thought"), ("img0", "problem image")):
        for layer, value in enumerate(curves["noise"][part]):
            values = pick("attention/attention.json", id=f"noise/txt1/{layer:02}")["values"]
            assert (value.low, value.high) == (values["low"][key], values["high"][key])
    assert all(value.low is None for value in curves["noise"]["question"])


def as_cell(value: Measured | None, want: Want, form: str = "{:.1f}") -> None:
    """A value that is handed to a figure, with its spread and sources."""
    assert value is not None
    text = form.format(value.value)
    if value.sd is not None:
        text += f" ± {form.format(value.sd)}"
    elif value.low is not None:
        text += f" ({form.format(value.low)} .. {form.format(value.high)})"
    same(Number(text, value.value, "measured", value.sources), want)


def test_radar_and_frontier_get_the_values_of_their_systems(whole):
    titles = {
        "ThinkMorph, draws": "thinkmorph", "ThinkMorph, text-only": "base", "Visual-OPSD": "opsd",
        "SFT": "sft",
    }  # fmt: skip
    ((rows, _), _) = whole[1]["radar"][0]
    assert list(rows) == list(titles)[:3]
    for title, row in rows.items():
        assert list(row) == list(TITLES[:4])
        for task, value in zip(TASKS, row.values(), strict=True):
            as_cell(value, by_seed(titles[title], task))
    ((points,), _) = whole[1]["pareto"][0]
    assert list(points) == list(titles)
    names = {"thinkmorph": "base, interleaved", "base": "base, text-only"}
    for title, (seconds, mean) in points.items():
        system = titles[title]
        id = names.get(system, f"{system}, text-only")
        as_cell(seconds, single(raw("latency/table.json", "seconds", id=id)))
        as_cell(mean, by_seed(system))
    ((timed,), _) = whole[1]["latency"][0]
    assert list(timed) == ["Visual-OPSD", "SFT", "ThinkMorph, text-only", "ThinkMorph, draws"]
    assert timed == {title: points[title][0] for title in timed}


def test_sweep_and_controls_get_the_values_of_their_runs(whole):
    ((panels, defaults), _) = whole[1]["sweep"][0]
    assert defaults == PLAN["defaults"]
    settings = [(knob, *setting) for knob, panel in panels.items() for setting in panel]
    for (knob, value, run), found in zip(SETTINGS, settings, strict=True):
        assert found[:2] == (knob, value)
        as_cell(found[2], single(accuracy(f"sweep/systems/{run}/scores.json")))
        share = raw("sweep/kl/summary.json", "gap_closed", run).times(100)
        as_cell(found[3], single(share))
    ((rows,), _) = whole[1]["controls"][0]
    assert list(rows) == [shown(task) for task in COLUMN_TASKS]
    for task, row in zip(COLUMN_TASKS, rows.values(), strict=True):
        assert list(row) == list(IN_KL)[:-1]
        for title, value in row.items():
            as_cell(value, kl(IN_KL[title], task), "{:.3f}")


def curve(file: str, key: str, task: str = OVERALL, factor: float = 1.0) -> list[tuple]:
    return [(step, raw(file, key, task=task, step=step).times(factor)) for step in STEPS]


def same_curve(points: Sequence[tuple[int, Measured]], wanted: Sequence[tuple[int, Raw]]) -> None:
    for (step, value), (at, want) in zip(points, wanted, strict=True):
        assert step == at and value.value == pytest.approx(want.value, rel=1e-12)
        assert value.sources == (want.source,)


def test_curves_get_the_validations_of_their_run(whole):
    accuracies, gaps, tasks, classes = whole[1]["curves"]
    for (args, named), key, factor in ((accuracies, "accuracy", 100), (gaps, "k_gen", 1)):
        trained = {
            f"{arm}, seed {s}": f"seed{s}/{arm}/validation.jsonl"
            for arm in ("opsd", "noise")
            for s in SEEDS
        }
        assert list(args[0]) == list(trained)
        for name, file in trained.items():
            same_curve(args[0][name], curve(file, key, factor=factor))
            assert named["best"][name] == chosen_step(file)
    file = "seed0/opsd/validation.jsonl"
    assert list(tasks[0][0]) == [shown(task) for task in COLUMN_TASKS[:-1]]
    for task, points in zip(TASKS, tasks[0][0].values(), strict=True):
        same_curve(points, curve(file, "k_gen", task))
    assert list(classes[0][0]) == list(CLASSES)
    for name, points in classes[0][0].items():
        same_curve(points, curve(file, f"k_gen_of/{name}"))


def test_strips_are_the_first_sample_of_each_task(whole):
    ((samples, _), _) = whole[1]["token_strips"][0]
    for task, (title, tokens) in zip(TASKS, samples, strict=True):
        first = pick("microscope/microscope.json", task, id=f"{task}/row-0")["values"]["tokens"]
        assert title == shown(task)
        assert tokens == [(token["text"], token["kl"], token["class"]) for token in first]


def test_cases_are_told_as_they_are_in_the_file(whole):
    (artefact,) = [artefact for artefact in whole[0] if artefact.name == "cases"]
    strips = [block for block in artefact.blocks if isinstance(block, Picture)]
    texts = [block for block in artefact.blocks if isinstance(block, Text)]
    records = FILES["cases/cases.json"]
    assert [strip.alt.partition(": ")[2] for strip in strips] == [
        "from left to right 1 problem, 1 drawn, 1 true"
    ] * 2
    assert [text.title for text in texts] == [
        "Visual Search, row-0: only thinkmorph is right",
        "Spatial Navigation, row-1: only opsd is right",
    ]
    for text, record in zip(texts, records, strict=True):
        values, joined = record["values"], "\n".join(text.lines)
        assert text.sources == (origin("cases/cases.json", record),)
        for part in (values["question"], values["gold"], f"case 1 of {values['total']}"):
            assert part in joined
        for answer in values["answers"]:
            verdict = "right" if answer["correct"] else "wrong"
            assert f"{answer['system']} ({verdict}): {answer['text']}" in text.lines
    assert "drawn again: wrote something else" in "\n".join(texts[1].lines)
