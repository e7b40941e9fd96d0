"""Figures of the report: what is drawn is what was passed, in its place, and can be read."""

import io
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from eval.artefacts.model import Measured
from eval.figure_style import LOOKS, WIDTH, Look, ends, looks_of
from eval.figures import (
    attention_by_layer,
    controls,
    curves,
    frontier,
    gains,
    interventions,
    latency,
    pareto,
    radar,
    sweep,
    token_strips,
    wins_and_losses,
)
from eval.figures_tokens import COLUMNS, wrap

TASKS = ("Visual_Search", "Chart Refocus", "Spatial Navigation", "Jigsaw Assembly")
MANY = [f"benchmark {i}" for i in range(11)]


def m(value, low=None, high=None, sd=None):
    return Measured(value, (), low, high, sd)


def exact(number):
    """Without the last digits, which sums of floats leave behind."""
    return round(float(number), 9)


def bars(axis):
    """Label -> (vertical centre, left end, width) of its bars."""
    found = {}
    for container in axis.containers:
        if isinstance(container, BarContainer):
            boxes = [
                (exact(b.get_y() + b.get_height() / 2), exact(b.get_x()), exact(b.get_width()))
                for b in container
            ]
            found.setdefault(container.get_label(), []).extend(boxes)
    return found


def spans(axis):
    """(vertical place, low, high) of the whiskers of bars."""
    lines = [c for c in axis.collections if c.get_label() == "whiskers"]
    segments = [segment for line in lines for segment in line.get_segments()]
    return sorted((exact(s[0][1]), exact(s[0][0]), exact(s[1][0])) for s in segments)


def ticks(axis):
    """Name -> place on the vertical axis."""
    labels = axis.get_yticklabels()
    return {t.get_text(): exact(place) for t, place in zip(labels, axis.get_yticks(), strict=True)}


def texts(figure):
    return [
        " ".join(t.get_text().split())
        for t in figure.findobj(Text)
        if t.get_visible() and t.get_text()
    ]


def notes(axis):
    """Text -> vertical place, of what was written into a panel."""
    return {text.get_text(): exact(text.xy[1]) for text in axis.texts}


def line(axis, label):
    [found] = [line for line in axis.lines if line.get_label() == label]
    return found


def points(axis, label):
    return [tuple(map(float, point)) for point in line(axis, label).get_xydata()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


DELTAS = {"a": m(-3, -5, 1), "b": None, "c": m(7, 6, 9), "d": m(2, sd=0.5)}


def test_gains_are_ordered_and_what_was_not_run_comes_last():
    [axis] = gains(DELTAS, "title", whiskers="x").axes
    at = ticks(axis)
    assert sorted(at, key=at.get) == ["c", "d", "a", "b"]
    assert axis.yaxis_inverted()
    found = bars(axis)
    assert [(y, w) for y, _, w in found["gain"]] == [(at["c"], 7), (at["d"], 2)]
    assert [(y, w) for y, _, w in found["loss"]] == [(at["a"], -3)]
    assert spans(axis) == [(at["c"], 6, 9), (at["d"], 1.5, 2.5), (at["a"], -5, 1)]
    expected = {"+7.0": at["c"], "+2.0": at["d"], "−3.0": at["a"], "not run": at["b"]}
    assert notes(axis) == expected
    assert [text.xy[0] for text in axis.texts] == [9, 2.5, 0, -5]
    assert axis.get_xlim()[0] < -5 and axis.get_xlim()[1] > 9


def test_gains_keep_their_order_if_asked():
    [axis] = gains(DELTAS, "title", ordered=False).axes
    at = ticks(axis)
    assert sorted(at, key=at.get) == list("abcd")
    assert [y for y, _, _ in bars(axis)["gain"]] == [at["c"], at["d"]]


def test_interventions_put_each_number_to_its_task_and_condition():
    conditions = ("real", "removed", "noise")
    table = {
        c: {t: m(20.0 * i + j, 20 * i + j - 1, 20 * i + j + 2) for i, t in enumerate(TASKS)}
        for j, c in enumerate(conditions)
    }
    table["removed"]["Chart Refocus"] = None
    figure = interventions(table)
    [axis] = figure.axes
    assert legend(figure) == list(conditions)
    found, at = bars(axis), list(ticks(axis).values())
    assert list(ticks(axis)) == ["Visual_Search", "Chart Refocus", "Spatial\nNavigation", TASKS[3]]
    for j, condition in enumerate(conditions):
        expected = [(exact(at[i] + j - 1), 20.0 * i + j) for i in range(4)]
        if condition == "removed":
            missing = expected.pop(1)
        assert [(y, w) for y, _, w in found[condition]] == expected
        assert all(x == 0 for _, x, _ in found[condition])
    assert notes(axis)["not run"] == missing[0]
    assert len(spans(axis)) == 11
    drawn = sorted((y, w) for row in found.values() for y, _, w in row)
    assert spans(axis) == [(y, w - 1, w + 2) for y, w in drawn]
    assert axis.get_xlim()[0] <= 0 and axis.get_xlim()[1] > 100


def test_controls_are_grouped_by_task():
    kl = {t: {"real": m(0.1 * i), "noise": m(0.1 * i + 0.05), "blank": None} for i, t in
          enumerate(TASKS, 1)}  # fmt: skip
    figure = controls(kl)
    [axis] = figure.axes
    assert legend(figure) == ["real", "noise", "blank"]
    at = list(ticks(axis).values())
    for j, shift in enumerate((0, 0.05)):
        found = bars(axis)[("real", "noise")[j]]
        assert [y for y, _, _ in found] == [exact(place + j - 1) for place in at]
        assert [w for _, _, w in found] == pytest.approx([0.1 * i + shift for i in range(1, 5)])
    assert texts(figure).count("not run") == 4
    assert "nats per token" in axis.get_xlabel()


def test_rows_with_different_tasks_are_refused():
    with pytest.raises(ValueError, match="'b' and the first row differ in 'y': use None"):
        interventions({"a": {"x": m(1)}, "b": {"x": m(1), "y": m(2)}})
    with pytest.raises(ValueError, match="nothing to draw"):
        interventions({"a": {}})
    with pytest.raises(ValueError, match="13 series, 12 can be told apart"):
        interventions({str(i): {"x": None} for i in range(13)})


def test_looks_are_told_apart_without_colour_and_can_be_chosen():
    assert len({look.marker for look in LOOKS}) == len(LOOKS)
    assert len({(look.color, look.hatch) for look in LOOKS}) == len(LOOKS)
    mine = {"b": Look("#123456", "", "o", "-"), "a": LOOKS[3]}
    [axis] = interventions({"a": {"x": m(1)}, "b": {"x": m(2)}}, looks=mine).axes
    faces = [container[0].get_facecolor() for container in axis.containers]
    assert faces == [to_rgba(LOOKS[3].color), to_rgba("#123456")]
    with pytest.raises(ValueError, match="no look for 'c'"):
        looks_of(["c"], mine)


def test_whiskers_are_the_spread_over_runs_or_the_interval():
    assert ends(m(5, 1, 8, sd=2)) == (3, 7)
    assert ends(m(5, 6, 8)) == (6, 8)
    assert ends(m(5)) == (5, 5)


def test_radar_has_each_value_on_its_spoke():
    table = {
        s: {t: m(10.0 * i + 5 * j, 10 * i + 5 * j - 2, 10 * i + 5 * j + 3) for i, t in
            enumerate(TASKS, 1)} for j, s in enumerate(("one", "two"))
    }  # fmt: skip
    table["two"]["Spatial Navigation"] = None
    figure = radar(table)
    [axis] = figure.axes
    one, two = points(axis, "one"), points(axis, "two")
    assert [r for _, r in one] == [10, 20, 30, 40, 10]
    assert math.isnan(two[2][1]) and [two[i][1] for i in (0, 1, 3, 4)] == [15, 25, 45, 15]
    for i in range(5):
        assert one[i][0] == pytest.approx(i * math.pi / 2, abs=0.1)
        assert 0 < two[i][0] - one[i][0] < 0.1
    assert axis.get_ylim() == (0, 100)
    assert [float(angle) for angle in axis.get_xticks()] == pytest.approx(
        [0, math.pi / 2, math.pi, 3 * math.pi / 2]
    )
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["Visual_Search", "Chart Refocus", "Spatial\nNavigation\n1 not run", TASKS[3]]
    assert any("Not run on Spatial Navigation: two." in text for text in texts(figure))
    radial = [s for c in axis.collections for s in c.get_segments()]
    assert len(radial) == 7
    assert [(float(s[0][1]), float(s[1][1])) for s in radial[:2]] == [(8, 13), (18, 23)]


def test_whiskers_of_a_radar_end_at_its_centre():
    [axis] = radar({"one": {t: m(1, sd=3) for t in "abc"}}).axes
    [whiskers] = axis.collections
    assert [(float(s[0][1]), float(s[1][1])) for s in whiskers.get_segments()] == [(0, 4)] * 3
    with pytest.raises(ValueError, match="at least 3 tasks"):
        radar({"one": {"a": m(1), "b": m(1)}})


def test_pareto_draws_the_frontier():
    figure = pareto(
        {
            "slow": (m(100, 90, 120), m(70, 66, 73)),
            "bad": (m(20), m(30)),
            "fast": (m(2, sd=3), m(60)),
            "gone": (m(1), None),
        }
    )
    [axis] = figure.axes
    assert points(axis, "frontier") == [(2, 60), (100, 70)]
    assert line(axis, "frontier").get_drawstyle() == "steps-post"
    assert axis.get_xscale() == "log" and axis.get_ylabel() == "accuracy, %"
    assert legend(figure) == [
        "slow: 100 s, 70.0 %", "bad: 20 s, 30.0 %", "fast: 2 s, 60.0 %",
        "gone: not run", "frontier",
    ]  # fmt: skip
    assert points(axis, "slow: 100 s, 70.0 %") == [(100, 70)]
    assert line(axis, "bad: 20 s, 30.0 %").get_markerfacecolor() == "white"
    assert line(axis, "fast: 2 s, 60.0 %").get_markerfacecolor() != "white"
    segments = [c.get_segments()[0].tolist() for c in axis.collections]
    assert segments[0] == [[90, 70], [120, 70]] and segments[1] == [[100, 66], [100, 73]]
    assert 0 < segments[4][0][0] < axis.get_xlim()[0]  # sd above the value: out of the picture
    assert axis.get_xlim()[0] < 2 and axis.get_xlim()[1] > 120


@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=3),
        st.tuples(st.integers(1, 6).map(float), st.integers(1, 6).map(float)),
        max_size=8,
    )
)
def test_frontier_is_what_nobody_beats(systems):
    kept = frontier(systems)

    def beaten(point):
        return any(
            other != point and other[0] <= point[0] and other[1] >= point[1]
            for other in systems.values()
        )

    assert {systems[name] for name in kept} == {p for p in systems.values() if not beaten(p)}
    assert [systems[name] for name in kept] == sorted({systems[name] for name in kept})


def test_latency_gives_seconds_and_their_ratio_to_the_first():
    seconds = {"mine": m(10, 9, 12), "lost": None, "teacher": m(143, 130, 150)}
    figure = latency(seconds)
    [axis] = figure.axes
    assert list(ticks(axis)) == list(seconds) and axis.yaxis_inverted()
    assert points(axis, "mine") == [(10, 0)] and points(axis, "teacher") == [(143, 2)]
    written = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert set(written) == {"10 s\n× 1", "not run", "143 s\n× 14.3"}
    assert written["not run"] == 1 and notes_y(axis, "143 s\n× 14.3") == 2
    segments = [c.get_segments()[0].tolist() for c in axis.collections]
    assert [[9, 0], [12, 0]] in segments and [[130, 2], [150, 2]] in segments
    assert axis.get_xscale() == "log" and "seconds" in axis.get_xlabel()
    assert any("relative to mine" in text for text in texts(figure))
    ratios = {"mine": m(1), "lost": None, "teacher": m(15, 14, 1600)}
    [axis] = latency(seconds, ratios=ratios).axes
    assert {t.get_text() for t in axis.texts} >= {"10 s\n× 1", "143 s\n× 15 (14 .. 1600)"}
    [axis] = latency({"mine": None, "teacher": m(3)}).axes
    assert {text.get_text() for text in axis.texts} == {"not run", "3 s"}


def notes_y(axis, wanted):
    [place] = [text.xy[1] for text in axis.texts if text.get_text() == wanted]
    return place


def test_attention_has_a_panel_per_condition_from_zero_to_one():
    curve = [m(0.2, 0.1, 0.3), m(0.5), m(0.9)]
    figure = attention_by_layer(
        {
            "drawn": {"image": curve, "thought": curve[::-1]},
            "noise": {"image": [m(0.4)] * 3, "thought": None},
            "blank": {},
        },
        uniform={"drawn": {"image": m(0.25)}},
    )
    drawn, noise, blank = figure.axes
    assert points(drawn, "image") == [(1, 0.2), (2, 0.5), (3, 0.9)]
    assert points(drawn, "thought") == [(1, 0.9), (2, 0.5), (3, 0.2)]
    assert points(noise, "image") == [(1, 0.4), (2, 0.4), (3, 0.4)]
    dotted = line(drawn, "uniform image")
    assert list(dotted.get_ydata()) == [0.25, 0.25] and dotted.get_linestyle() == ":"
    assert dotted.get_color() == line(drawn, "image").get_color()
    assert not [one for one in noise.lines if one.get_label() != "image"] and not blank.lines
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles == ["drawn", "noise (not run: thought)", "blank"]
    assert [text.get_text() for text in blank.texts] == ["not run"]
    assert {axis.get_ylim() for axis in figure.axes} == {(0, 1)}
    assert {axis.get_xlim() for axis in figure.axes} == {(0.5, 3.5)}
    assert drawn.collections[0].get_segments()[0].tolist() == [[1, 0.1], [1, 0.3]]
    assert legend(figure) == ["image", "thought", "if all positions counted alike"]


def test_wins_and_losses_are_stacked_in_percent():
    counts = {"a": (10, 5, 2, 3), "b": None, "c": (1, 1, 1, 1)}
    figure = wins_and_losses(counts, "mine", "teacher", p={"a": 0.0312})
    [axis] = figure.axes
    found = bars(axis)
    assert list(found) == ["both right", "only mine", "only teacher", "neither"]
    assert [found[key][0] for key in found] == [(0, 0, 50), (0, 50, 25), (0, 75, 10), (0, 85, 15)]
    assert [found[key][1] for key in found] == [(2, 25 * i, 25) for i in range(4)]
    assert list(ticks(axis)) == list("abc") and legend(figure) == list(found)
    written = {t.get_text(): t.xy[1] for t in axis.texts if isinstance(t, Annotation)}
    assert {text: round(y) for text, y in written.items()} == {
        "n = 20; 5 wins, 2 losses; p = 0.031": 0, "not run": 1, "n = 4; 1 wins, 1 losses": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'a' has no questions"):
        wins_and_losses({"a": (0, 0, 0, 0)}, "x", "y")
    with pytest.raises(ValueError, match="p of 'z'"):
        wins_and_losses({"a": (1, 0, 0, 0)}, "x", "y", p={"z": 1.0})


def test_sweep_marks_defaults_and_keeps_both_quantities_apart():
    figure = sweep(
        {
            "K": [("8", m(40, 38, 42), m(-30)), ("64", m(50), m(70))],
            "clip": [("none", None, m(20)), ("0.05", m(51), None)],
        },
        {"K": "64", "clip": "0.05"},
    )
    axes = figure.axes
    assert [axis.get_title("left") for axis in axes] == ["K", "", "clip", ""]
    assert list(ticks(axes[0])) == ["8", "64 (default)"]
    assert list(ticks(axes[2])) == ["none", "0.05 (default)"]
    widths = [{name: [(y, w) for y, _, w in b] for name, b in bars(axis).items()} for axis in axes]
    assert widths[0] == {"8": [(0, 40)], "64": [(1, 50)]}
    assert widths[1] == {"8": [(0, -30)], "64": [(1, 70)]}
    assert widths[2]["0.05"] == [(1, 51)] and widths[3]["none"] == [(0, 20)]
    assert notes(axes[2])["not run"] == 0 and notes(axes[3])["not run"] == 1
    assert spans(axes[0]) == [(0, 38, 42)] and spans(axes[1]) == []
    faces = {c.get_label(): c[0].get_facecolor() for c in axes[0].containers}
    assert faces["64"] == to_rgba(LOOKS[0].color) != faces["8"]
    assert axes[2].get_xlabel() == "accuracy, %" and axes[3].get_xlabel() == "gap closed, %"
    assert axes[1].get_xlim()[0] < -30 and axes[0].get_xlim()[0] == 0
    # what collapsed does not flatten the others; its number stays
    low = m(-8913.7, -9500, -8000)
    far = sweep({"K": [("8", m(40), low), ("64", m(50), m(70, -200, 90))]}, {"K": "8"}).axes[1]
    assert [(w) for found in bars(far).values() for _, _, w in found] == [-100, 70]
    assert -300 < far.get_xlim()[0] < -100 and "◂ −8913.7" in notes(far)
    assert spans(far) == [(1, -100, 90)]
    with pytest.raises(ValueError, match="default '7' of 'K' is not among"):
        sweep({"K": [("8", None, None)]}, {"K": "7"})


def test_curves_leave_gaps_and_mark_the_best():
    series = {"a": [(0, m(1)), (10, None), (20, m(3, 2, 5))], "b": [(0, m(7))], "c": None}
    figure = curves(
        series, "title", "KL, nats", references={"base": m(4), "old": None}, best={"a": 20}
    )
    [axis] = figure.axes
    a = points(axis, "a")
    assert (a[0], a[2]) == ((0, 1), (20, 3)) and a[1][0] == 10 and math.isnan(a[1][1])
    assert points(axis, "b") == [(0, 7)] and points(axis, "c") == []
    assert points(axis, "best a") == [(20, 3)]
    assert list(line(axis, "base").get_ydata()) == [4, 4]
    assert legend(figure) == [
        "a (not run at 10)", "b", "c (not run)", "base", "old (not run)", "best on validation data",
    ]  # fmt: skip
    assert axis.collections[0].get_segments()[0].tolist() == [[20, 2], [20, 5]]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("KL, nats", "optimizer steps")
    with pytest.raises(ValueError, match="best step 10 of 'a'"):
        curves(series, "t", "y", best={"a": 10})


LINE = [(" the", 0.0, "function"), (" left", 2.0, "content"), (" $x$", 0.5, "other"),
        ("\n", 4.0, "other"), (" 中" + "z" * 60, 9.0, "content")]  # fmt: skip


def token_boxes(axis):
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]


def test_tokens_are_coloured_by_their_kl_on_one_scale():
    figure = token_strips([("one", LINE), ("two", [(" left", 2.0, "tag")])], top=4.0)
    page, key = figure.axes
    boxes = token_boxes(page)
    assert [box.get_label() for box in boxes] == [
        " the", " left", " $x$", "↵", " □" + "z" * 21 + "…", " left",
    ]  # fmt: skip
    faces = [box.get_facecolor() for box in boxes]
    light = [sum(face[:3]) for face in faces]
    assert light[0] > light[2] > light[1] > light[3] == light[4]
    assert faces[5] == faces[1]
    written = {text.get_text(): text for text in page.texts}
    assert (
        written[" the"].get_style() == "italic"
        and written[" □" + "z" * 21 + "…"].get_weight() == "bold"
    )
    assert written[" the"].get_color() == "black" and written["↵"].get_color() == "white"
    assert key.get_xlabel() == "KL, nats" and any("largest KL is 9" in t for t in texts(figure))


def test_scale_of_tokens_ends_at_a_high_percentile():
    tokens = [("a", float(i), "content") for i in range(1, 101)]
    figure = token_strips([("one", tokens)])
    boxes = token_boxes(figure.axes[0])
    assert boxes[97].get_facecolor() == boxes[99].get_facecolor() != boxes[96].get_facecolor()
    with pytest.raises(ValueError, match="9 samples: pass 1 to 8"):
        token_strips([("one", tokens)] * 9)
    with pytest.raises(ValueError, match="top must be above 0"):
        token_strips([("one", [("a", 0.0, "tag")])])
    with pytest.raises(ValueError, match="no sample has a token"):
        token_strips([("one", [])])


@given(st.lists(st.text(max_size=40), max_size=60))
def test_wrapping_keeps_every_token_once_and_in_its_line(tokens):
    lines = wrap([(text, 0.0, "other") for text in tokens])
    assert [number for row in lines for number, _, _ in row] == list(range(len(tokens)))
    for row in lines:
        assert [column for _, column, _ in row] == [
            sum(len(shown) for _, _, shown in row[:place]) for place in range(len(row))
        ]
        assert sum(len(shown) for _, _, shown in row) <= COLUMNS
        assert all(shown for _, _, shown in row)


def test_letters_stay_in_their_boxes():
    figure = token_strips([("one", LINE * 6)])
    FigureCanvasAgg(figure).draw()
    page = figure.axes[0]
    letters = [text for text in page.texts if text.get_family() == ["DejaVu Sans Mono"]]
    for text, box in zip(letters, token_boxes(page), strict=True):
        outer, inner = box.get_window_extent(), text.get_window_extent()
        assert outer.x0 - 2 <= inner.x0 and inner.x1 <= outer.x1 + 2


def wide(i):
    """Values near both ends, with and without intervals, some of them missing."""
    values = (m(0.0, 0, 0.7), m(100.0, 99, 100), m(55.5, sd=30), None, m(0.4, sd=2), m(99.96))
    return values[i % len(values)]


SYSTEMS = ["base, text only", "Visual-OPSD", "noise control", "interleaved teacher"]
TABLE = {s: {t: wide(i + 2 * j) for i, t in enumerate(MANY)} for j, s in enumerate(SYSTEMS)}
SECONDS = [m(10.0 ** (i - 2), sd=3 * 10.0 ** (i - 3)) for i in range(4)]
FIGURES = {
    "radar": lambda: radar(TABLE, whiskers="95 % interval"),
    "radar of 4": lambda: radar(
        {s: {t: TABLE[s][MANY[i]] for i, t in enumerate(TASKS)} for s in SYSTEMS}),
    "gains": lambda: gains(
        {t: wide(i) or m(-77, -99, 3) for i, t in enumerate(MANY)}, "Gains " * 12),
    "interventions": lambda: interventions(TABLE, whiskers="± standard deviation over 3 runs"),
    "controls": lambda: controls(
        {t: {f"control {i}": m(0.01 * i) for i in range(7)} for t in TASKS}),
    "pareto": lambda: pareto(
        {f"system with a name {i}": (SECONDS[i % 4], m(50.0 + i)) for i in range(8)}),
    "latency": lambda: latency(dict(zip(SYSTEMS, SECONDS, strict=True)), whiskers="sd"),
    "attention": lambda: attention_by_layer(
        {c: {s: [m(0.03 * i, sd=0.05) for i in range(28)] for s in ("text", "problem image")}
         for c in SYSTEMS}, uniform={SYSTEMS[0]: {"text": m(0.3)}}, whiskers="sd"),
    "wins": lambda: wins_and_losses(
        {t: (i, 1, 2, 300) for i, t in enumerate(MANY)}, SYSTEMS[1], SYSTEMS[3],
        p=dict.fromkeys(MANY, 1e-9)),
    "curves": lambda: curves(
        {s: [(10 * i, m(i + j, sd=1)) for i in range(30)] for j, s in enumerate(MANY)}, "title",
        "KL, nats", references={"base": m(5)}, best={MANY[3]: 100}),
    "sweep": lambda: sweep(
        {k: [(f"{k} {i}", wide(i), m(90 - 120 * i)) for i in range(4)]
         for k in ("top-K", "clip", "beta")},
        {"clip": "clip 2"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_large_enough_and_do_not_cover_each_other(name):
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    beyond = ticks_beyond(figure)
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    shown = [t for t in shown if t not in beyond]
    boxes = [t.get_window_extent() for t in shown]
    clashes = [
        (shown[i].get_text(), shown[j].get_text())
        for i, j in itertools.combinations(range(len(boxes)), 2)
        if boxes[i].overlaps(boxes[j]) and overlap(boxes[i], boxes[j]) > 2
    ]
    assert not clashes
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert all(figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert figure.get_figwidth() == WIDTH
    assert min(t.get_fontsize() for t in shown) / 72 * 358 / WIDTH >= 8


def ticks_beyond(figure):
    """Labels that matplotlib keeps but does not draw: those of ticks outside the limits."""
    found = []
    for axis in itertools.chain.from_iterable((a.xaxis, a.yaxis) for a in figure.axes):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-6 * (high - low)
        for tick in axis.get_major_ticks():
            if not low - slack <= tick.get_loc() <= high + slack:
                found += [tick.label1, tick.label2]
    return found


def overlap(one, other):
    """Pixels by which two boxes overlap where they overlap least: line boxes may touch."""
    return min(
        min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
    )


EMPTY = {
    "radar": lambda: radar({"a": dict.fromkeys(TASKS)}),
    "gains": lambda: gains(dict.fromkeys(TASKS), "title"),
    "interventions": lambda: interventions({"a": dict.fromkeys(TASKS)}),
    "controls": lambda: controls({"a": {"real": None}}),
    "pareto": lambda: pareto({"a": (None, m(1))}),
    "latency": lambda: latency({"a": None}),
    "attention": lambda: attention_by_layer({"a": {"text": None}}),
    "wins": lambda: wins_and_losses({"a": None}, "x", "y"),
    "curves": lambda: curves({"a": None}, "title", "y"),
    "sweep": lambda: sweep({"a": [("1", None, None)]}, {}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_but_not_run_is_said_and_no_zero_drawn(name):
    figure = EMPTY[name]()
    FigureCanvasAgg(figure).draw()
    assert any("not run" in text for text in texts(figure))
    assert not any(bars(axis).get(key) for axis in figure.axes for key in bars(axis))
    data = [y for axis in figure.axes for line in axis.lines if line.get_label() in ("a", "text")
            for y in line.get_ydata()]  # fmt: skip
    assert all(math.isnan(y) for y in data)


def test_pictures_are_the_same_every_time():
    def png():
        stream = io.BytesIO()
        FIGURES["controls"]().savefig(stream, dpi=50)
        return stream.getvalue()

    assert png() == png()
