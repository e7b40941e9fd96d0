"""What the paper lacks: controls, learning curves, classes of tokens, Theorem 1, seeds."""

from dataclasses import replace

from eval.artefacts.model import Measured, NotRun, Number, Source, Table, measured, missing
from eval.artefacts.results import OVERALL, Record, source_of
from eval.artefacts.runs import MEAN, Runs, titled
from eval.artefacts.tables import SYSTEMS, gap
from eval.token_classes import TEST

KL_CONTROLS = {  # measure of the diagnostic -> title
    "pre": "its own VTs",
    "shuffled_vt": "another problem's",
    "crop_vt": "a crop of the problem",
    "problem_vt": "the problem again",
    "noise_vt": "noise",
    "blank_vt": "blank",
    "prompts_only": "prompts alone",
    "identical": "same context twice",
}
SHOWN = {  # system -> title
    "base": "no VTs: the untrained student",
    "teacher": "its own VTs",
    "teacher-shuffled": "another problem's",
    "teacher-crop": "a crop of the problem",
    "teacher-problem": "the problem again",
    "teacher-noise": "noise",
    "teacher-blank": "blank",
    "prompts-only": "prompts alone",
}
PILOT = {  # system -> title, by folder
    ("systems", "thinkmorph"): "draws its VTs",
    ("systems", "thinkmorph-noise"): "shown noise in their place",
    ("controls", "thinkmorph-shuffled"): "shown another problem's",
    ("systems", "thinkmorph-none"): "asks, and is shown nothing",
    ("systems", "base"): "text-only",
}


def kl_controls(runs: Runs) -> Table:
    """The KL that other pictures cause on the same completions."""
    rows = []
    for task in [*runs.tasks("kl/summary.json"), OVERALL]:
        cells = [
            runs.cell(lambda seed, m=measure, t=task: gap(runs, seed, m, t), "{:.3f}")
            for measure in KL_CONTROLS
        ]
        rows.append((titled(task), *cells))
    note = (
        "Nats per token between the base with something in the place of its visual thoughts and "
        "without, on the same texts. Mean ± sd over seeds."
    )
    title = "K_gen under controls"
    return Table("controls_kl", title, ("task", *KL_CONTROLS.values()), tuple(rows), note)


def accuracy_controls(runs: Runs) -> Table:
    """What the base makes of other pictures in its context."""
    names = runs.columns("controls", list(SHOWN))
    rows = [
        (title, *(runs.cell(runs.accuracy("controls", system, column)) for column in names))
        for system, title in SHOWN.items()
    ]
    header = ("in the place of the VTs", *map(titled, names))
    note = "Accuracy of the base in %, mean ± sd over seeds; same questions, same seeds."
    return Table("controls_accuracy", "The base shown other pictures", header, tuple(rows), note)


def conditions(runs: Runs) -> dict[tuple[str, str], str]:
    """What of PILOT was asked the same questions: pictures of other rows only fit data sets that
    have some, and the benchmarks of the paper do not.
    """
    names = runs.columns("systems", [system for folder, system in PILOT if folder == "systems"])
    return {
        (folder, system): title
        for (folder, system), title in PILOT.items()
        if folder == "systems" or runs.columns(folder, [system]) in ([MEAN], names)
    }


def pilot(runs: Runs) -> Table:
    """Interventions on the visual thoughts of the model that draws."""
    names = runs.columns("systems", [system for folder, system in PILOT if folder == "systems"])
    rows = [
        (title, *(runs.cell(runs.accuracy(folder, system, column)) for column in names))
        for (folder, system), title in conditions(runs).items()
    ]
    note = "Accuracy in %, mean ± sd over seeds; the same model, questions and seeds."
    title = "The model that draws, with its VTs replaced"
    return Table("figure3a", title, ("visual thought", *map(titled, names)), tuple(rows), note)


def per_seed(runs: Runs) -> Table:
    """The mean accuracy of every system, seed by seed."""
    rows = []
    for system, title in SYSTEMS.items():
        cells = [
            runs.single(lambda s=seed, n=system: runs.accuracy("systems", n, MEAN)(s))
            for seed in runs.seeds
        ]
        rows.append((title, *cells))
    header = ("system", *(f"seed {seed}" for seed in runs.seeds))
    note = "Mean accuracy in % with 95 % intervals over questions."
    return Table("seeds", "Seed by seed", header, tuple(rows), note)


def validations(
    runs: Runs, seed: int, arm: str, key: str, task: str = OVERALL
) -> list[tuple[int, Measured]]:
    """A value of the validations during training: (updates, value).

    Raises:
        NotRun: there are none, they lack the value, or the run did not come to its end.
    """
    file = f"seed{seed}/{arm}/validation.jsonl"
    found = []
    for record in runs.results.records(file):
        if record["task"] != task:
            continue
        value = record["values"].get(key)
        if value is None:
            raise NotRun(f"{file}: {key}")
        found.append((record["step"], Measured(value, (source_of(file, record),))))
    if not found or found[-1][0] < runs.plan.steps:
        raise NotRun(f"{file}: update {runs.plan.steps}")
    return found


def checkpoints(runs: Runs) -> Table:
    """Accuracy and gap closed on validation data while training."""
    rows = []
    for arm in ("opsd", "noise"):
        for seed in runs.seeds:
            rows += _curve_rows(runs, arm, seed)
    header = ("run", "updates", "accuracy, %", "K_gen, nats per token", "gap closed, %", "choice")
    note = (
        "Validation data, frozen probe set. Best is the checkpoint that validation would choose: "
        "highest accuracy, at equal accuracy the smallest gap. The tables evaluate the last one of "
        "every run, without any choice."
    )
    return Table("checkpoints", "Checkpoints over training", header, tuple(rows), note)


def _curve_rows(runs: Runs, arm: str, seed: int) -> list[tuple]:
    read = runs.found(
        lambda: [validations(runs, seed, arm, key) for key in ("accuracy", "k_gen", "gap_closed")]
    )
    name = f"{arm}, seed {seed}"
    if read is None:
        return [(name, "", missing(), missing(), missing(), "")]
    best = chosen(read[0], read[1])
    return [
        (
            name,
            str(step),
            measured(accuracy.scaled(100)),
            measured(k, "{:.3f}"),
            measured(closed.scaled(100)),
            "best" if step == best else "",
        )
        for (step, accuracy), (_, k), (_, closed) in zip(*read, strict=True)
    ]


def chosen(accuracy: list[tuple[int, Measured]], k_gen: list[tuple[int, Measured]]) -> int:
    """The update whose checkpoint validation keeps; the start does not count."""
    pairs = zip(accuracy, k_gen, strict=True)
    ranked = [(a.value, -k.value, -step) for (step, a), (_, k) in pairs if step]
    return -max(ranked)[2] if ranked else 0


HEALTH = {  # metric -> title and form
    "k_gen": ("K_gen, on-policy", "{:.3f}"),
    "student_entropy": ("entropy", "{:.3f}"),
    "student_mass_outside": ("mass outside K", "{:.4f}"),
    "clipped_share": ("clipped", "{:.3f}"),
    "completion_length": ("tokens", "{:.1f}"),
    "ended_by_budget": ("cut off", "{:.3f}"),
    "empty_completions": ("empty", "{:.3f}"),
    "image_skips": ("image skips", "{:.3f}"),
    "over_cap": ("over the cap", "{:.3f}"),
    "skipped_records": ("unusable rows", "{:.3f}"),
    "teacher_drift": ("teacher drift", "{:.4f}"),
}
LIGHTS = {0: "green", 1: "yellow", 2: "red"}


def health(runs: Runs) -> Table:
    """The last metrics of every run, and the worst light of its sentinel."""
    rows = []
    for arm in ("opsd", "noise"):
        for seed in runs.seeds:
            found = runs.found(lambda s=seed, a=arm: _metrics(runs, s, a))
            name = f"{arm}, seed {seed}"
            if found is None:
                rows.append((name, *(missing(),) * (len(HEALTH) + 1)))
                continue
            sources, last, light = found
            cells = [
                runs.single(lambda m=metric, s=sources, line=last: _metric(line, m, s), form)
                for metric, (_, form) in HEALTH.items()
            ]
            rows.append((name, *cells, Number(LIGHTS[light], light, "measured", sources)))
    header = ("run", *(title for title, _ in HEALTH.values()), "sentinel, worst")
    note = (
        "Means over the last logged interval of sampled completions, per token or per completion; "
        "drift is the root-mean-square distance of teacher and student."
    )
    return Table("health", "What was watched while training", header, tuple(rows), note)


def _metrics(runs: Runs, seed: int, arm: str) -> tuple[tuple[Source, ...], Record, int]:
    """Origin of a run, its last line of metrics, and the worst light.

    Raises:
        NotRun: there is no such run, or it did not come to its end.
    """
    file, origin = (f"seed{seed}/{arm}/{name}.jsonl" for name in ("metrics", "validation"))
    lines = runs.results.lines(file)
    steps = [line for line in lines if "k_gen" in line]
    if not steps or steps[-1]["step"] < runs.plan.steps:
        raise NotRun(f"{file}: update {runs.plan.steps}")
    record = runs.results.records(origin)[0]  # metrics do not say which command wrote them
    lights = [line[name] for line in lines for name in ("sentinel", "val/sentinel") if name in line]
    sources = (source_of(file, record), source_of(origin, record))
    return sources, steps[-1], int(max(lights, default=0))


def _metric(line: Record, name: str, sources: tuple[Source, ...]) -> Measured:
    """A value of a line of metrics.

    Raises:
        NotRun: there was nothing to measure: the name is not there, or null.
    """
    value = line.get(name)
    if value is None:
        raise NotRun(f"{sources[0].file}: {name}")
    return Measured(value, sources)


def token_classes(runs: Runs) -> Table:
    """Which tokens the visual thoughts move, by class."""
    file = "seed0/kl/tokens.json"
    records = runs.found(lambda: runs.results.records(file)) or []
    classes = [r["id"] for r in records if r["task"] == OVERALL and "share" in r["values"]]
    rows = []
    for name in classes:
        cells = [
            runs.cell(lambda s, n=name, k=key: _token(runs, s, n, k), form)
            for key, form in (("tokens", "{:.0f}"), ("mean", "{:.3f}"), ("share", "{:.3f}"))
        ]
        rows.append((name, *cells))
    if not rows:
        rows = [(OVERALL, missing(), missing(), missing())]
    header = ("class", "tokens", "KL, nats per token", "share of all KL")
    note = "Data set texts, all tasks; mean ± sd over seeds."
    return Table("token_classes", "KL by class of token", header, tuple(rows), note)


def _token(runs: Runs, seed: int, name: str, key: str) -> Measured:
    return runs.results.value(f"seed{seed}/kl/tokens.json", key, id=name)


def token_test(runs: Runs) -> Table:
    """Content words against function words, per seed, of tasks that have both."""
    rows = []
    for seed in runs.seeds:
        file = f"seed{seed}/kl/tokens.json"
        records = runs.found(lambda f=file: runs.results.records(f))
        if records is None:
            rows.append((f"seed {seed}", missing(), missing(), missing()))
        for record in records or []:
            if record["id"] != TEST:
                continue
            where = {"task": record["task"], "id": TEST}
            n, value, low, high, p = (
                runs.results.value(file, key, **where) for key in ("n", "value", "low", "high", "p")
            )
            difference = replace(value, low=low.value, high=high.value)
            cells = (measured(n, "{:.0f}"), measured(difference, "{:.3f}"), measured(p, "{:.2g}"))
            rows.append((f"seed {seed}, {titled(record['task'])}", *cells))
    header = ("sample of", "n", "content - function words, nats (95 %)", "p")
    note = "Paired within samples; sign-flip permutation test; of tasks that have function words."
    title = "Content against function words"
    return Table("token_test", title, header, tuple(rows) or ((OVERALL, *(missing(),) * 3),), note)


def theorem(runs: Runs) -> Table:
    """Where distillation against noisy teachers ends."""
    file = "theorem/theorem.json"
    columns = {
        "forward KL, to p*": "forward KL: its minimiser to p*",
        "forward KL, to the mean": "forward KL: to the arithmetic mean",
        "JSD, to p*": "JSD: to p*",
        "JSD, to the mean": "JSD: to the arithmetic mean",
        "reverse KL, to p*": "reverse KL: to p*",
        "broken": "Eq. 8 fails, %",
    }
    rows = []
    for record in runs.found(lambda: runs.results.records(file)) or []:
        task = record["task"]
        cells = []
        for key in columns:
            value = runs.results.value(file, key, task=task)
            broken = key == "broken"
            cells.append(
                measured(value.scaled(100 if broken else 1), "{:.1f}" if broken else "{:.2g}")
            )
        rows.append((task, *cells))
    if not rows:
        rows = [("all sizes", *(missing() for _ in columns))]
    header = ("size of the noise", *columns.values())
    note = "Total variation between distributions, 0 to 1; invented teachers over 16 entries."
    return Table("theorem", "Theorem 1 by numbers", header, tuple(rows), note)
