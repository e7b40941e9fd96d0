"""The figures of the paper, and learning curves, from result files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from eval import figures
from eval.artefacts.extras import KL_CONTROLS, chosen, conditions, validations
from eval.artefacts.model import Cell, Measured, NotRun, Picture, Table, measured, missing
from eval.artefacts.results import OVERALL, sources_of
from eval.artefacts.runs import MEAN, Runs, sources_in, titled
from eval.artefacts.tables import (
    gap,
    points_above,
    seconds,
    swept,
    swept_gap,
    swept_values,
)

SPREAD = "standard deviation over seeds"
INTERVALS = "95 % intervals over questions"
SHOWN = {"thinkmorph": "ThinkMorph, draws", "base": "ThinkMorph, text-only", "opsd": "Visual-OPSD"}
ALL = SHOWN | {"sft": "SFT", "noise": "OPSD-Noise"}
OF_CLASS = "k_gen_of/"
SPOKES = 3  # with fewer tasks there is no radar; the bars beside it have them all
Row = dict[str, Measured | None]
Curves = Mapping[str, list[tuple[int, Measured]] | None]


def _picture(
    name: str, title: str, alt: str, values: Iterable[Measured | None], draw: Callable[[], Figure]
) -> Picture | None:
    """A picture of these values; None where none of them was run."""
    used = sources_in(list(values))
    return Picture(name, title, alt, draw(), used) if used else None


def _accuracies(runs: Runs, folder: str, system: str) -> Row:
    """Column -> accuracy over seeds, the mean included."""
    names = runs.columns("systems", list(ALL))
    return {titled(n): runs.value(runs.accuracy(folder, system, n)) for n in names}


def _spread(runs: Runs) -> str:
    return SPREAD if len(runs.seeds) > 1 else INTERVALS


def figure1(runs: Runs) -> list[Picture | None]:
    """Radar, gains over the model that draws, accuracy against seconds."""
    table = {title: _accuracies(runs, "systems", s) for s, title in SHOWN.items()}
    rows = {
        title: {task: v for task, v in row.items() if task != MEAN} for title, row in table.items()
    }
    points = {
        title: (
            runs.found(lambda s=system: seconds(runs, s)),
            runs.value(runs.accuracy("systems", system, MEAN)),
        )
        for system, title in {k: v for k, v in ALL.items() if k != "noise"}.items()
    }
    return [
        _picture(
            "figure1a", "Fig. 1a: accuracy by task", "radar chart of accuracies",
            [v for row in rows.values() if len(row) >= SPOKES for v in row.values()],
            lambda: figures.radar(rows, "Accuracy by task, %", whiskers=_spread(runs)),
        ),
        _gains(runs, "figure1b", "Fig. 1b: Visual-OPSD minus ThinkMorph", "thinkmorph"),
        _picture(
            "figure1c", "Fig. 1c: accuracy against seconds", "scatter plot of systems",
            [v for pair in points.values() for v in pair],
            lambda: figures.pareto(points, whiskers=_spread(runs)),
        ),
    ]  # fmt: skip


def _gains(runs: Runs, name: str, title: str, other: str) -> Picture | None:
    columns = runs.columns("systems", ["opsd"])
    deltas = {
        titled(n): runs.value(lambda seed, n=n: points_above(runs, seed, "opsd", other, n))
        for n in columns
    }
    alt = f"bars of {title}, points per task"
    return _picture(
        name, title, alt, deltas.values(),
        lambda: figures.gains(deltas, title, whiskers=_spread(runs)),
    )  # fmt: skip


def figure3a(runs: Runs) -> Picture | None:
    """Accuracy of the model that draws, with its visual thoughts replaced."""
    rows = {title: _accuracies(runs, *where) for where, title in conditions(runs).items()}
    return _picture(
        "figure3a", "Fig. 3a: visual thoughts replaced at inference",
        "bars of accuracy per intervention and task",
        [v for row in rows.values() for v in row.values()],
        lambda: figures.interventions(rows, whiskers=_spread(runs)),
    )  # fmt: skip


MODES = {"drawn": "its own drawing", "noise": "noise", "shuffled": "another problem's VT"}
PARTS = {
    "img1": "visual thought", "img0": "problem image", "question": "question",
    "system": "system prompt", "txt0": "first text", "txt1": "its own text so far",
    "marks": "marks around pictures",
}  # fmt: skip


def figure3b(runs: Runs) -> Picture | None:
    """Attention of the text after the picture, by layer and source."""
    curves, even = {}, {}
    for mode, title in MODES.items():
        curves[title] = {
            part: runs.found(lambda m=mode, k=key: attention(runs, m, k))
            for key, part in PARTS.items()
        }
        flat = runs.found(lambda m=mode: attention(runs, m, "uniform", "img1"))
        if flat is not None:
            even[title] = {PARTS["img1"]: flat[0]}
    title = "Fig. 3b: what the text after a picture looks at"
    alt = "shares of attention by source over layers, one panel per kind of picture"
    return _picture(
        "figure3b", title, alt,
        [v for parts in curves.values() for layers in parts.values() for v in layers or []],
        lambda: figures.attention_by_layer(
            curves, "Attention of the text after the picture", uniform=even, whiskers=INTERVALS
        ),
    )  # fmt: skip


def attention(runs: Runs, mode: str, *keys: str) -> list[Measured]:
    """A share per layer, in the order of the layers; those of the pictures have intervals.

    Raises:
        NotRun: the mode was not run.
    """
    file, start = "attention/attention.json", f"{mode}/txt1/"
    layers = sorted(
        r["id"] for r in runs.results.records(file)
        if r["task"] == OVERALL and r["id"].startswith(start)
    )  # fmt: skip
    if not layers:
        raise NotRun(f"{file}: {start}")
    found = []
    for layer in layers:
        share = runs.results.value(file, *keys, id=layer)
        if keys in (("img0",), ("img1",)):
            low, high = (runs.results.value(file, end, *keys, id=layer) for end in ("low", "high"))
            share = replace(share, low=low.value, high=high.value)
        found.append(share)
    return found


def attention_table(runs: Runs) -> Table:
    """The shares of picture and problem in numbers, with those of an even spread."""
    rows: list[tuple[Cell, ...]] = []
    keys = (("img1",), ("uniform", "img1"), ("img0",), ("uniform", "img0"))
    for mode, title in MODES.items():
        shares = [runs.found(lambda m=mode, k=key: attention(runs, m, *k)) for key in keys]
        if None in shares:
            rows.append((title, *(missing(),) * len(keys)))
            continue
        for layer, values in enumerate(zip(*shares, strict=True), 1):
            cells = [measured(value.scaled(100)) for value in values]
            rows.append((f"{title}, layer {layer}", *cells))
    header = (
        "picture",
        "on it, %",
        "even spread, %",
        "on the problem, %",
        "even spread, %, problem",
    )
    note = "Attention of the text after the picture; 95 % intervals over samples."
    return Table("figure3b", "Attention after the picture", header, tuple(rows), note)


def figure5(runs: Runs) -> Picture | None:
    """Wins and losses of the student against the model that draws."""
    tasks = runs.tasks("pairs.json") or [OVERALL]
    found = {t: runs.found(lambda t=t: runs.paired("opsd", "thinkmorph", t)) for t in tasks}
    counts = {
        titled(t): None if f is None else (f.both, f.only_first, f.only_second, f.neither)
        for t, f in found.items()
    }
    tests = {titled(t): f.p for t, f in found.items() if f is not None}
    return _picture(
        "figure5", "Fig. 5: Visual-OPSD against ThinkMorph", "stacked bars of questions per task",
        [f and f.difference for f in found.values()],
        lambda: figures.wins_and_losses(
            counts, "Visual-OPSD", "ThinkMorph", p=tests, title="Question by question"
        ),
    )  # fmt: skip


def figure6(runs: Runs) -> Picture | None:
    """KL by token on one completion per task."""
    file = "microscope/microscope.json"
    records = runs.found(lambda: runs.results.records(file))
    if records is None:
        return None
    first = {}
    for record in records:
        first.setdefault(record["task"], record)
    samples = [
        (titled(task), [(t["text"], t["kl"], t["class"]) for t in record["values"]["tokens"]])
        for task, record in first.items()
    ]
    figure = figures.token_strips(samples, "KL by token: the first sample of each task")
    used = sources_of(file, list(first.values()))
    title = "Fig. 6: KL by token"
    return Picture("figure6", title, "tokens coloured by their KL", figure, used)


def figure7(runs: Runs) -> list[Picture | None]:
    """Gains over SFT by task, and seconds."""
    timed = {
        title: runs.found(lambda s=system: seconds(runs, s))
        for system, title in {"opsd": ALL["opsd"], "sft": ALL["sft"], "base": ALL["base"],
                              "thinkmorph": ALL["thinkmorph"]}.items()
    }  # fmt: skip
    return [
        _gains(runs, "figure7a", "Fig. 7a: Visual-OPSD minus SFT from BAGEL", "sft"),
        _picture(
            "figure7b", "Fig. 7b: seconds per sample", "bars of seconds", timed.values(),
            lambda: figures.latency(timed),
        ),
    ]  # fmt: skip


def sweeps(runs: Runs) -> Picture | None:
    """Table 6 as a picture."""
    panels, used = {}, []
    for knob in runs.plan.sweeps:
        panel = []
        for value, run in swept_values(runs, knob):
            pair = [runs.found(lambda r=run, f=read: f(runs, r)) for read in (swept, swept_gap)]
            used += pair
            panel.append((value, *pair))
        panels[knob] = panel
    alt = "accuracy and gap closed by value of each knob"
    return _picture(
        "table6", "Table 6 as a picture", alt, used,
        lambda: figures.sweep(panels, runs.plan.defaults, whiskers=INTERVALS),
    )  # fmt: skip


def controls(runs: Runs) -> Picture | None:
    """The KL under controls."""
    tasks = runs.tasks("kl/summary.json")
    shown = {m: t for m, t in KL_CONTROLS.items() if m != "identical"}
    rows = {
        titled(task): {
            title: runs.value(lambda s, m=measure, t=task: gap(runs, s, m, t))
            for measure, title in shown.items()
        }
        for task in [*tasks, OVERALL]
    }
    return _picture(
        "controls", "K_gen with other pictures in the place of the visual thoughts",
        "bars of KL by control and task", [v for row in rows.values() for v in row.values()],
        lambda: figures.controls(rows, whiskers=_spread(runs)),
    )  # fmt: skip


def learning(runs: Runs) -> list[Picture | None]:
    """Accuracy and gap on validation data over training, per arm and seed."""
    shown = {"accuracy": ("accuracy, %", 100.0), "k_gen": ("K_gen, nats per token", 1.0)}
    pictures = []
    for key, (label, scale) in shown.items():
        series, best = {}, {}
        for arm in ("opsd", "noise"):
            for seed in runs.seeds:
                name = f"{arm}, seed {seed}"
                points = runs.found(lambda s=seed, a=arm, k=key: validations(runs, s, a, k))
                series[name] = points and [(n, v.scaled(scale)) for n, v in points]
                if points:
                    k_gen = validations(runs, seed, arm, "k_gen")
                    best[name] = chosen(validations(runs, seed, arm, "accuracy"), k_gen)
        title = f"Validation while training: {label}"
        pictures.append(_curves(f"learning_{key}", title, series, label, best))
    return pictures


def _curves(
    name: str, title: str, series: Curves, label: str, best: Mapping[str, float] | None = None
) -> Picture | None:
    return _picture(
        name, title, "curves over updates",
        [value for points in series.values() for _, value in points or []],
        lambda: figures.curves(series, title, label, best=best),
    )  # fmt: skip


def live_gap(runs: Runs) -> list[Picture | None]:
    """The gap by task and by class of token on the frozen probe set, first seed."""
    tasks = runs.found(lambda: runs.results.tasks("seed0/opsd/validation.jsonl")) or []
    by_task = {
        titled(task): runs.found(lambda t=task: validations(runs, 0, "opsd", "k_gen", task=t))
        for task in tasks
    }
    classes = runs.found(lambda: _classes(runs)) or []
    by_class = {
        name: runs.found(lambda n=name: validations(runs, 0, "opsd", f"{OF_CLASS}{n}"))
        for name in classes
    }
    shown = {"live_tasks": (by_task, "task"), "live_classes": (by_class, "class of token")}
    return [
        _curves(name, f"K_gen by {what}, probe set, seed 0", series, "nats per token")
        for name, (series, what) in shown.items()
    ]


def _classes(runs: Runs) -> list[str]:
    """Classes of tokens of the probe set.

    Raises:
        NotRun: the run did not measure them.
    """
    file = "seed0/opsd/validation.jsonl"
    values = runs.results.record(file, step=0)["values"]
    found = [name.removeprefix(OF_CLASS) for name in values if name.startswith(OF_CLASS)]
    if not found:
        raise NotRun(f"{file}: {OF_CLASS}")
    return found
