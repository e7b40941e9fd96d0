"""Tables 1 to 6 of the paper, and the paired tests that it lacks."""

from collections.abc import Sequence

from eval.artefacts.model import Cell, Measured, NotRun, Number, Table, measured, missing
from eval.artefacts.results import OVERALL, Record
from eval.artefacts.runs import (
    MEAN,
    Runs,
    from_paper,
    p_value,
    paper_values,
    scores_of,
    titled,
)
from eval.experiments import PAIRS

SYSTEMS = {  # folder -> title, in the order of Table 2
    "bagel": "BAGEL: before it drew",
    "thinkmorph": "ThinkMorph: draws its VTs",
    "base": "ThinkMorph, text-only: the untrained student",
    "sft": "text-only SFT, from BAGEL",
    "sft_base": "text-only SFT, from ThinkMorph",
    "noise": "Visual-OPSD-Noise",
    "opsd": "Visual-OPSD",
}
TIMED = {  # folder -> its row in the comparison of seconds
    "thinkmorph": "base, interleaved",
    "base": "base, text-only",
    "sft": "sft, text-only",
    "noise": "noise, text-only",
    "opsd": "opsd, text-only",
}
CATEGORIES = ("Visual_Search", "Spatial_Navigation", "Chart_Refocus", "Jigsaw_Assembly", OVERALL)
PAPERS = "paper"
FROM_THE_PAPER = "Copied from the paper, of a 7B model; not a result of this code."


def table1(runs: Runs) -> Table:
    """K_gen before training."""
    rows = []
    for task in CATEGORIES:
        values = [runs.found(lambda t=task, s=s: _rows(runs, s, t)) for s in runs.seeds]
        n: Cell = missing() if None in values else measured(sum_of(values), "{:.0f}", False)
        k = runs.cell(lambda s, t=task: gap(runs, s, "pre", t), "{:.3f}")
        rows.append((titled(task), n, k, from_paper("table1", task)))
    header = ("task", "samples, all seeds", "K_gen, nats per token", PAPERS)
    note = (
        "Mean ± sd over seeds, full vocabulary, on data set texts; the paper's is of a 7B model on "
        "another completion grammar: magnitudes do not compare."
    )
    return Table("table1", "K_gen of the base", header, tuple(rows), note)


def _rows(runs: Runs, seed: int, task: str) -> Measured:
    return runs.results.value(f"seed{seed}/kl/summary.json", "n", task=task)


def sum_of(values: Sequence[Measured]) -> Measured:
    sources = tuple(source for value in values for source in value.sources)
    return Measured(sum(value.value for value in values), sources)


def gap(runs: Runs, seed: int, measure: str, task: str = OVERALL, folder: str = "kl") -> Measured:
    """A mean KL of the diagnostic, nats per token."""
    return runs.results.value(f"seed{seed}/{folder}/summary.json", measure, task=task)


def closed(
    runs: Runs, seed: int, student: str, task: str = OVERALL, folder: str = "kl"
) -> Measured:
    """Share of the gap that a student closed, in %."""
    file = f"seed{seed}/{folder}/summary.json"
    return runs.results.value(file, "gap_closed", student, task=task).scaled(100)


def table2(runs: Runs) -> list[Table]:
    """Accuracy and seconds of all systems; the paired tests; the paper's own table."""
    names = runs.columns("systems", list(SYSTEMS))
    rows = []
    for system, title in SYSTEMS.items():
        cells: list[Cell] = [
            runs.cell(runs.accuracy("systems", system, column)) for column in names
        ]
        paper: Cell = from_paper("table2", system, place=-1)
        if system == "base":
            paper = from_paper("text_only")
        rows.append((title, *cells, seconds_cell(runs, system), paper, _paper_seconds(system)))
    header = ("system", *map(titled, names), "s per sample", "paper Avg", "paper s")
    note = (
        "Accuracy in %, greedy, mean ± sd over seeds. Seconds: see the table of seconds (Fig. 7). "
        "In the miniature, BAGEL is a model with random weights, and SFT has the reference texts, "
        "which OPSD never sees."
    )
    main = Table("table2", "Accuracy and seconds", header, tuple(rows), note)
    return [main, paired_table(runs, "table2_paired", PAIRS), papers_table2()]


def seconds_cell(runs: Runs, system: str) -> Cell:
    if system not in TIMED:
        return "–"
    return runs.single(lambda: seconds(runs, system), "{:.4f}")


def seconds(runs: Runs, system: str) -> Measured:
    """Median seconds of a single sample, in the first seed's run."""
    return runs.results.value("latency/table.json", "seconds", id=TIMED[system])


def _paper_seconds(system: str) -> Cell:
    return from_paper("seconds", system, form="{:.1f}")


def latency(runs: Runs) -> Table:
    """Seconds of single samples with all that they depend on."""
    file = "latency/table.json"
    records = runs.found(lambda: _timed(runs, file)) or []
    rows = []
    for record in records:
        name, drawing = record["id"], record["values"]["drawing"]
        ratio, per_sample, tokens = (
            runs.results.value(file, key, id=name) for key in ("ratio", "seconds", "tokens")
        )
        speed = Measured(tokens.value / per_sample.value, tokens.sources)
        sides = [record["values"][f"picture_{side}"] for side in ("width", "height")]
        cells = [measured(per_sample, "{:.4f}"), measured(ratio), measured(tokens)]
        cells += [
            measured(speed, "{:.0f}"),
            "–" if drawing is None else "{:.0f} x {:.0f}".format(*sides),
        ]
        cells += [
            "–" if drawing is None else str(drawing[key])
            for key in ("num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale")
        ]
        rows.append((name, *cells))
    header = (
        "system", "s per sample", "times the last", "tokens", "tokens per s", "picture",
        "grid points", "shift", "guidance, text", "guidance, image",
    )  # fmt: skip
    note = (
        "Median of single samples, every system on the same one in turn; ratios are medians of "
        "paired ratios. Tokens per second are mean tokens over these seconds, those of drawing "
        "too. Guidance 1.0 is none."
    )
    rows = rows or [("all", *(missing(),) * (len(header) - 1))]
    return Table("latency", "Seconds, and what they depend on", header, tuple(rows), note)


def _timed(runs: Runs, file: str) -> list[Record]:
    """The records of the comparison of seconds.

    Raises:
        NotRun: they are missing, or from before they named their settings.
    """
    records = runs.results.records(file)
    if any("drawing" not in record["values"] for record in records):
        raise NotRun(f"{file}: drawing")
    return records


def paired_table(runs: Runs, name: str, pairs: Sequence[str]) -> Table:
    """Differences of the means with interval, exact test and the value of each seed."""
    rows = []
    for pair in pairs:
        first, second = pair.split(":")
        rows.append((f"{first} - {second}", *_paired_cells(runs, first, second)))
    header = ("pair", "points (95 %)", *_by_seed(runs), "only first", "only second", "p")
    note = (
        "Questions of all seeds; where seeds share them, the interval is the mean of theirs and p "
        "the largest. Interval and exact McNemar test are over questions, not over training runs; "
        "the columns by seed show how far those differ."
    )
    return Table(name, "Paired tests", header, tuple(rows), note)


def _by_seed(runs: Runs) -> list[str]:
    return [f"seed {seed}" for seed in runs.seeds]


def _paired_cells(runs: Runs, first: str, second: str, task: str = OVERALL) -> tuple[Cell, ...]:
    found = runs.found(lambda: runs.paired(first, second, task))
    seeds = [
        runs.found(lambda s=seed: runs.difference(s, first, second, task)) for seed in runs.seeds
    ]
    by_seed = [missing() if v is None else measured(v, "{:+.1f}", False) for v in seeds]
    if found is None:
        return (missing(), *by_seed, *(missing(),) * 3)
    sources = found.difference.sources
    counts = (Measured(float(n), sources) for n in (found.only_first, found.only_second))
    return (
        measured(found.difference, "{:+.1f}"),
        *by_seed,
        *(measured(count, "{:.0f}") for count in counts),
        Number(p_value(found.p), found.p, "measured", sources),
    )


def wins(runs: Runs) -> Table:
    """Questions that one of student and drawing model got right, per task."""
    rows = []
    for task in [*runs.tasks("pairs.json"), OVERALL]:
        rows.append((titled(task), *_paired_cells(runs, "opsd", "thinkmorph", task)))
    header = ("task", "points (95 %)", *_by_seed(runs), "only OPSD", "only ThinkMorph", "p")
    title = "Visual-OPSD minus ThinkMorph, question by question"
    return Table("figure5", title, header, tuple(rows), "Questions of all seeds.")


def papers_table2() -> Table:
    names = paper_values()["table2"]["columns"]
    systems = [system for system in SYSTEMS if system in paper_values()["table2"]]
    rows = tuple(
        (SYSTEMS[s], *(from_paper("table2", s, place=i) for i in range(len(names))))
        for s in systems
    )
    title = "The paper's own Table 2"
    return Table("table2_paper", title, ("system", *names), rows, FROM_THE_PAPER)


def table3(runs: Runs) -> Table:
    """What the teacher sees decides: nothing, noise, real VTs."""
    variants = {
        "base": ("untrained student", "-"),
        "sft": ("text-only SFT, from BAGEL", "none"),
        "noise": ("Visual-OPSD-Noise", "Gaussian noise"),
        "opsd": ("Visual-OPSD", "real"),
    }
    names = runs.columns("systems", list(variants))
    rows = []
    for system, (title, shown) in variants.items():
        cells = [runs.cell(runs.accuracy("systems", system, column)) for column in names]
        above = [_difference(runs, system, other) for other in ("sft", "base")]
        paper = from_paper("table2", system, place=-1)
        rows.append((title, shown, *cells, *above, paper))
    header = (
        "variant",
        "teacher's VTs",
        *map(titled, names),
        "- SFT",
        "- untrained",
        "paper Avg",
    )
    return Table("table3", "VT quality", header, tuple(rows), "Accuracy in %, points.")


def _difference(runs: Runs, system: str, other: str) -> Cell:
    """Points over another system, mean and spread over seeds."""
    if system == other or (system == "base" and other == "sft"):
        return "–"
    return runs.cell(lambda seed: points_above(runs, seed, system, other), "{:+.1f}")


def points_above(
    runs: Runs, seed: int, system: str, other: str, column: str = MEAN, folder: str = "systems"
) -> Measured:
    """Accuracy minus that of another system, of one seed."""
    a, b = (runs.accuracy(folder, name, column)(seed) for name in (system, other))
    return Measured(a.value - b.value, tuple(dict.fromkeys((*a.sources, *b.sources))))


def table4(runs: Runs) -> list[Table]:
    """Output tokens per answer, and the paper's own table."""
    systems = ("opsd", "thinkmorph", "sft", "base")
    file = next(
        (f for f in (scores_of(0, "systems", s) for s in systems) if runs.results.has(f)), ""
    )
    tasks = [*runs.results.tasks(file), OVERALL] if file else [OVERALL]
    rows = []
    for task in tasks:
        cells = [
            runs.cell(
                lambda seed, s=s, t=task: runs.results.value(
                    scores_of(seed, "systems", s), "mean_tokens", task=t
                )
            )
            for s in systems
        ]
        rows.append((titled(task), *cells))
    header = ("benchmark", *(SYSTEMS[s] for s in systems))
    note = (
        "Generated tokens, without turn tokens and without diffusion steps; mean ± sd over seeds."
    )
    ours = Table("table4", "Output tokens per answer", header, tuple(rows), note)
    theirs = tuple(
        (task, *(from_paper("table4", task, form="{:.1f}", place=place) for place in range(3)))
        for task in paper_values()["table4"]
    )
    title = "The paper's own Table 4"
    return [ours, Table("table4_paper", title, header[:4], theirs, FROM_THE_PAPER)]


def table5(runs: Runs) -> list[Table]:
    """Gap closing (Eq. 9) on data set texts and on the base's own samples."""
    return [
        _closing(runs, "table5", "kl", "on data set texts"),
        _closing(runs, "table5_own", "kl_own", "on the base's own samples"),
        papers_table5(),
    ]


def papers_table5() -> Table:
    rows = tuple(
        (
            titled(task),
            *(from_paper("table5", task, place=place) for place in range(3)),
            *(from_paper("closed", task, form="{:.1f}", place=place) for place in range(2)),
        )
        for task in CATEGORIES
    )
    header = ("task", "K_gen before", "K after, noise", "K after, OPSD", "closed, noise, %")
    header += ("closed, OPSD, %",)
    return Table("table5_paper", "The paper's own Table 5", header, rows, FROM_THE_PAPER)


def _closing(runs: Runs, name: str, folder: str, where: str) -> Table:
    rows = []
    for task in CATEGORIES:
        cells: list[Cell] = [runs.cell(lambda s, t=task: gap(runs, s, "pre", t, folder), "{:.3f}")]
        for student in ("noise", "sft_base", "opsd"):
            post = f"post:{student}"
            cells.append(runs.cell(lambda s, t=task, m=post: gap(runs, s, m, t, folder), "{:.3f}"))
            cells.append(
                runs.cell(lambda s, t=task, n=student: closed(runs, s, n, t, folder), "{:.1f}")
            )
        rows.append((titled(task), *cells))
    header = ("task", "K_gen before")
    for title in ("noise", "SFT from ThinkMorph", "OPSD"):
        header += (f"K after, {title}", f"closed, {title}, %")
    note = "Nats per token; share of the gap in %, below zero it has grown. Mean ± sd over seeds."
    return Table(name, f"Gap closing {where}", header, tuple(rows), note)


def swept_values(runs: Runs, knob: str) -> list[tuple[str, str]]:
    """(value, name of its run) of a knob, the default among them, in order."""
    default = runs.plan.defaults[knob]
    values = sorted({default, *runs.plan.sweeps[knob]}, key=lambda value: _order(knob, value))
    return [(value, "default" if value == default else f"{knob}-{value}") for value in values]


def table6(runs: Runs) -> Table:
    """Sensitivity to the knobs: one seed, one knob at a time."""
    settings = {knob: swept_values(runs, knob) for knob in runs.plan.sweeps}
    trained = [run for values in settings.values() for _, run in values]
    names = runs.columns_in("sweep/systems", trained)
    rows = []
    for knob, values in settings.items():
        for value, run in values:
            label = f"{knob} {value}" + (" (default)" if run == "default" else "")
            cells = [
                runs.single(lambda r=run, c=column: swept(runs, r, c), "{:.1f}") for column in names
            ]
            share = runs.single(lambda r=run: swept_gap(runs, r), "{:.1f}")
            rows.append((label, *cells, share, from_paper("table6", knob, value)))
    header = ("run", *map(titled, names), "gap closed, %", "paper, mean of 3")
    note = (
        "Accuracy in % and gap closed with 95 % intervals over questions and texts; one training "
        "run each, so differences of a few points may be chance. 0 means off: all entries, no "
        "clip. The paper's mean is over VSP, VisPuzzle and BLINK-J."
    )
    return Table("table6", "Sensitivity", header, tuple(rows), note)


def _order(knob: str, value: str) -> tuple[float, str]:
    """Numbers by size, those that switch off last; words by name."""
    off = knob in ("jsd_top_k", "jsd_token_clip") and value == "0"
    return (0.0 if knob == "teacher_mode" else float("inf") if off else float(value)), value


def swept(runs: Runs, run: str, column: str = MEAN) -> Measured:
    """Accuracy of a run of the sweep, in %."""
    return runs.column(f"sweep/systems/{run}/scores.json", column)


def swept_gap(runs: Runs, run: str) -> Measured:
    """Share of the gap that a run of the sweep closed, in %."""
    return runs.results.value("sweep/kl/summary.json", "gap_closed", run).scaled(100)
