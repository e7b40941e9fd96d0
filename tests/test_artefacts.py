"""Every number of the report, from invented results: each cell of each table against plain sums,
what the figures draw, what the ledger says on both sides of its rules, and what a lost file does.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import takewhile
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from data.miniworld.world import TASKS
from eval import figures
from eval.artefacts import pictures
from eval.artefacts.catalogue import ARTEFACTS
from eval.artefacts.claims import CLAIMS
from eval.artefacts.ledger import Claim
from eval.artefacts.markdown import status
from eval.artefacts.model import Artefact, Cell, Measured, Number, Picture, Source, Table, Text
from eval.artefacts.results import Results
from eval.artefacts.runs import RunPlan, Runs
from eval.artefacts.tables import table1, table2
from eval.artefacts.write import PNG_HEAD
from eval.experiments import MINI, Plan
from eval.files.registry import COLUMNS, PAPER
from eval.kl_scoring import CONTROLS_OF, IDENTICAL, TEACHER_VTS
from eval.pairs import Pair
from eval.report import collect, main, publish
from eval.statistics import mcnemar, wilson_interval
from eval.theorem import measure
from eval.token_classes import TEST, Difference
from tests.invented_results import (
    CLASSES,
    LAYERS,
    OVERALL,
    PLAN,
    SEEDS,
    STEPS,
    Files,
    Record,
    invented_files,
    pictures_of,
    scores,
    write_file,
    write_results,
)

FILES = invented_files()
PICTURES = pictures_of(FILES)
PAPERS = yaml.safe_load(Path("eval/artefacts/paper.yaml").read_text(encoding="utf-8"))
COLUMN_TASKS = (*TASKS, OVERALL)


# --- what is expected, in plain Python ------------------------------------------------------------


@dataclass(frozen=True)
class Want:
    """A cell with a number as it should be."""

    text: str
    value: float | None
    sources: frozenset[Source] = frozenset()
    kind: str = "measured"


@dataclass(frozen=True)
class Raw:
    """A value of a file, as it stands there, with the record that it is in."""

    value: float
    source: Source
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> "Raw":
        ends = (None if end is None else factor * end for end in (self.low, self.high))
        return Raw(factor * self.value, self.source, *ends)


def pick(file: str, task: str = OVERALL, files: Files = FILES, **also: Any) -> Record:
    (found,) = [
        record
        for record in files[file]
        if record["task"] == task and all(record[k] == v for k, v in also.items())
    ]
    return found


def origin(file: str, record: Record) -> Source:
    return Source(file, record["command"], record["commit"], record["seed"])


def raw(file: str, *keys: str, task: str = OVERALL, files: Files = FILES, **also: Any) -> Raw:
    record = pick(file, task, files, **also)
    value = record["values"]
    for key in keys:
        value = value[key]
    source = origin(file, record)
    if isinstance(value, dict):
        return Raw(value["value"], source, value["low"], value["high"])
    return Raw(value, source)


def accuracy(file: str, task: str = OVERALL, files: Files = FILES) -> Raw:
    """In percent, with the interval that stands beside it."""
    record = pick(file, task, files)
    values = record["values"]
    point = Raw(values["accuracy"], origin(file, record), values["low"], values["high"])
    return point.times(100)


def over_seeds(read: Callable[[int], Raw], form: str = "{:.1f}") -> Want:
    found = [read(seed) for seed in SEEDS]
    values = [value.value for value in found]
    text = f"{form.format(fmean(values))} ± {form.replace('+', '').format(stdev(values))}"
    return Want(text, fmean(values), frozenset(value.source for value in found))


def single(value: Raw, form: str = "{:.1f}") -> Want:
    text = form.format(value.value)
    if value.low is not None:
        text += f" ({form.format(value.low)} .. {form.format(value.high)})"
    return Want(text, value.value, frozenset([value.source]))


def papers(value: float, form: str = "{:.2f}") -> Want:
    return Want(form.format(value), value, kind="paper")


def by_seed(system: str, task: str = OVERALL, folder: str = "systems") -> Want:
    return over_seeds(lambda seed: accuracy(f"seed{seed}/{folder}/{system}/scores.json", task))


def shown(task: str) -> str:
    return task.replace("_", " ")


TITLES = ("Visual Search", "Spatial Navigation", "Jigsaw Assembly", "Chart Refocus", "mean")
BY_CATEGORY = ("Visual_Search", "Spatial_Navigation", "Chart_Refocus", "Jigsaw_Assembly", OVERALL)
SYSTEMS = {
    "bagel": "BAGEL: before it drew",
    "thinkmorph": "ThinkMorph: draws its VTs",
    "base": "ThinkMorph, text-only: the untrained student",
    "sft": "text-only SFT, from BAGEL",
    "sft_base": "text-only SFT, from ThinkMorph",
    "noise": "Visual-OPSD-Noise",
    "opsd": "Visual-OPSD",
}
Rows = list[tuple[str | Want, ...]]


def kl(measure: str, task: str, form: str = "{:.3f}", folder: str = "kl") -> Want:
    return over_seeds(lambda s: raw(f"seed{s}/{folder}/summary.json", measure, task=task), form)


def expect_table1() -> Rows:
    rows = []
    for task in BY_CATEGORY:
        counts = [raw(f"seed{seed}/kl/summary.json", "n", task=task) for seed in SEEDS]
        total = sum(count.value for count in counts)
        n = Want(str(total), total, frozenset(count.source for count in counts))
        rows.append((shown(task), n, kl("pre", task), papers(PAPERS["table1"][task])))
    return rows


def expect_table2() -> Rows:
    timed = {
        "thinkmorph": "base, interleaved", "base": "base, text-only", "sft": "sft, text-only",
        "opsd": "opsd, text-only",
    }  # fmt: skip
    rows = []
    for system, title in SYSTEMS.items():
        means = {name: values[-1] for name, values in PAPERS["table2"].items()}
        means |= {"base": PAPERS["text_only"]}
        seconds: str | Want = "–"
        if system in timed:
            seconds = single(raw("latency/table.json", "seconds", id=timed[system]), "{:.4f}")
        rows.append(
            (
                title,
                *(by_seed(system, task) for task in COLUMN_TASKS),
                seconds,
                papers(means[system]) if system in means else "–",
                papers(PAPERS["seconds"][system], "{:.1f}") if system in PAPERS["seconds"] else "–",
            )
        )
    return rows


def small(p: float) -> str:
    return "< 1e-6" if p < 1e-6 else f"{p:.2g}"


def paired_cells(pair: str, task: str = OVERALL) -> list[Want]:
    files = [f"seed{seed}/pairs.json" for seed in SEEDS]
    records = [pick(file, task, id=pair) for file in files]
    origins = [origin(*both) for both in zip(files, records, strict=True)]
    differences = [record["values"]["difference"] for record in records]
    mean = 100 * fmean(d["value"] for d in differences)
    below = 100 * hypot(*(d["value"] - d["low"] for d in differences)) / 3
    above = 100 * hypot(*(d["high"] - d["value"] for d in differences)) / 3
    first, second = (
        sum(record["values"][name] for record in records) for name in ("only_first", "only_second")
    )
    every, p = frozenset(origins), mcnemar(first, second)
    return [
        Want(f"{mean:+.1f} ({mean - below:+.1f} .. {mean + above:+.1f})", mean, every),
        *(
            Want(f"{100 * d['value']:+.1f}", 100 * d["value"], frozenset([source]))
            for d, source in zip(differences, origins, strict=True)
        ),
        Want(str(first), first, every),
        Want(str(second), second, every),
        Want(small(p), p, every),
    ]


def expect_paired() -> Rows:
    pairs = dict.fromkeys(record["id"] for record in FILES["seed0/pairs.json"])
    assert len(pairs) == 10
    return [(" - ".join(pair.split(":")), *paired_cells(pair)) for pair in pairs]


def expect_papers() -> Rows:
    systems = ("bagel", "thinkmorph", "sft", "noise", "opsd")
    return [(SYSTEMS[s], *map(papers, PAPERS["table2"][s])) for s in systems]


def expect_seeds() -> Rows:
    return [
        (title, *(single(accuracy(f"seed{seed}/systems/{s}/scores.json")) for seed in SEEDS))
        for s, title in SYSTEMS.items()
    ]


def minus(system: str, other: str, task: str = OVERALL) -> Want:
    pairs = [
        [accuracy(f"seed{seed}/systems/{name}/scores.json", task) for name in (system, other)]
        for seed in SEEDS
    ]
    points = [a.value - b.value for a, b in pairs]
    text = f"{fmean(points):+.1f} ± {stdev(points):.1f}"
    return Want(text, fmean(points), frozenset(value.source for pair in pairs for value in pair))


def expect_table3() -> Rows:
    variants = {
        "base": ("untrained student", "-"),
        "sft": ("text-only SFT, from BAGEL", "none"),
        "noise": ("Visual-OPSD-Noise", "Gaussian noise"),
        "opsd": ("Visual-OPSD", "real"),
    }
    rows = []
    for system, names in variants.items():
        above_sft = "–" if system in ("base", "sft") else minus(system, "sft")
        above_base = "–" if system == "base" else minus(system, "base")
        paper = "–" if system == "base" else papers(PAPERS["table2"][system][-1])
        cells = [by_seed(system, task) for task in COLUMN_TASKS]
        rows.append((*names, *cells, above_sft, above_base, paper))
    return rows


def expect_table4() -> Rows:
    systems = ("opsd", "thinkmorph", "sft", "base")
    rows: Rows = [
        (
            shown(task),
            *(
                over_seeds(
                    lambda seed, s=s, t=task: raw(
                        f"seed{seed}/systems/{s}/scores.json", "mean_tokens", task=t
                    )
                )
                for s in systems
            ),
        )
        for task in COLUMN_TASKS
    ]
    own = [papers(PAPERS["tokens"][s], "{:.1f}") for s in systems[:3]]
    return [*rows, ("paper's average", *own, "–")]


def expect_closing(folder: str) -> Rows:
    rows = []
    for task in BY_CATEGORY:
        cells = [kl("pre", task, folder=folder)]
        for student in ("noise", "sft_base", "opsd"):
            cells.append(kl(f"post:{student}", task, folder=folder))
            cells.append(
                over_seeds(
                    lambda seed, t=task, s=student: raw(
                        f"seed{seed}/{folder}/summary.json", "gap_closed", s, task=t
                    ).times(100)
                )
            )
        if folder == "kl":
            cells += [papers(value, "{:.1f}") for value in PAPERS["closed"][task]]
        rows.append((shown(task), *cells))
    return rows


SETTINGS = (  # knob, its value, the name of its run
    ("jsd_top_k", "4", "jsd_top_k-4"),
    ("jsd_top_k", "64", "default"),
    ("jsd_top_k", "128", "jsd_top_k-128"),
    ("jsd_top_k", "0", "jsd_top_k-0"),
    ("jsd_token_clip", "0.01", "jsd_token_clip-0.01"),
    ("jsd_token_clip", "0.1", "jsd_token_clip-0.1"),
    ("jsd_token_clip", "0", "default"),
    ("jsd_beta", "0", "jsd_beta-0"),
    ("jsd_beta", "0.1", "default"),
    ("jsd_beta", "1", "jsd_beta-1"),
    ("teacher_mode", "ema", "default"),
    ("teacher_mode", "fixed", "teacher_mode-fixed"),
    ("teacher_mode", "self", "teacher_mode-self"),
    ("ema_decay", "0.98", "ema_decay-0.98"),
    ("ema_decay", "0.998", "default"),
    ("ema_decay", "0.9995", "ema_decay-0.9995"),
)


def expect_table6() -> Rows:
    rows = []
    for knob, value, run in SETTINGS:
        title = f"{knob} {value}" + (" (default)" if run == "default" else "")
        file = f"sweep/systems/{run}/scores.json"
        cells = [single(accuracy(file, task)) for task in COLUMN_TASKS]
        share = single(raw("sweep/kl/summary.json", "gap_closed", run).times(100))
        paper = PAPERS["table6"].get(knob, {}).get(value)
        rows.append((title, *cells, share, "–" if paper is None else papers(paper)))
    return rows


PILOT = {
    "draws its VTs": ("systems", "thinkmorph"),
    "shown noise in their place": ("systems", "thinkmorph-noise"),
    "shown another problem's": ("controls", "thinkmorph-shuffled"),
    "asks, and is shown nothing": ("systems", "thinkmorph-none"),
    "text-only": ("systems", "base"),
}
IN_CONTEXT = {
    "no VTs: the untrained student": "base",
    "its own VTs": "teacher",
    "another problem's": "teacher-shuffled",
    "a crop of the problem": "teacher-crop",
    "the problem again": "teacher-problem",
    "noise": "teacher-noise",
    "blank": "teacher-blank",
    "prompts alone": "prompts-only",
}
IN_KL = {
    "its own VTs": "pre",
    "another problem's": "shuffled_vt",
    "a crop of the problem": "crop_vt",
    "the problem again": "problem_vt",
    "noise": "noise_vt",
    "blank": "blank_vt",
    "prompts alone": "prompts_only",
    "same context twice": "identical",
}


def expect_pilot() -> Rows:
    return [
        (title, *(by_seed(system, task, folder) for task in COLUMN_TASKS))
        for title, (folder, system) in PILOT.items()
    ]


def expect_controls() -> Rows:
    return [
        (title, *(by_seed(system, task, "controls") for task in COLUMN_TASKS))
        for title, system in IN_CONTEXT.items()
    ]


def expect_kl_controls() -> Rows:
    return [(shown(t), *(kl(name, t) for name in IN_KL.values())) for t in COLUMN_TASKS]


def expect_classes() -> Rows:
    forms = {"tokens": "{:.0f}", "mean": "{:.3f}", "share": "{:.3f}"}
    return [
        (
            name,
            *(
                over_seeds(lambda s, n=name, k=key: raw(f"seed{s}/kl/tokens.json", k, id=n), form)
                for key, form in forms.items()
            ),
        )
        for name in CLASSES
    ]


def expect_token_test() -> Rows:
    rows = []
    for seed in SEEDS:
        for task in (TASKS[1], OVERALL):
            file = f"seed{seed}/kl/tokens.json"
            record = pick(file, task, id="content - function")
            values, source = record["values"], origin(file, record)
            ends = values["low"], values["high"]
            rows.append(
                (
                    f"seed {seed}, {shown(task)}",
                    Want(str(values["n"]), values["n"], frozenset([source])),
                    single(Raw(values["value"], source, *ends), "{:.3f}"),
                    single(Raw(values["p"], source), "{:.2g}"),
                )
            )
    return rows


def chosen_step(file: str) -> int:
    """By the rule of training: best accuracy, then smallest gap; the start is no checkpoint."""
    scored = [
        (raw(file, "accuracy", step=step).value, -raw(file, "k_gen", step=step).value, -step)
        for step in STEPS[1:]
    ]
    return -max(scored)[2]


def expect_checkpoints() -> Rows:
    rows = []
    for arm in ("opsd", "noise"):
        for seed in SEEDS:
            file = f"seed{seed}/{arm}/validation.jsonl"
            for step in STEPS:
                cells = (
                    single(raw(file, "accuracy", step=step).times(100)),
                    single(raw(file, "k_gen", step=step), "{:.3f}"),
                    single(raw(file, "gap_closed", step=step).times(100)),
                )
                best = "best" if step == chosen_step(file) else ""
                rows.append((f"{arm}, seed {seed}", str(step), *cells, best))
    return rows


def expect_theorem() -> Rows:
    keys = [f"{name}, to {end}" for name in ("forward KL", "JSD") for end in ("p*", "the mean")]
    keys += ["reverse KL, to p*"]
    file = "theorem/theorem.json"
    return [
        (
            task,
            *(single(raw(file, key, task=task), "{:.2g}") for key in keys),
            single(raw(file, "broken", task=task).times(100)),
        )
        for task in ("noise 0.1", "noise 0.5", "noise 1.0", "noise 2.0")
    ]


EXPECTED: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "table1": (("task", "samples, all seeds", "K_gen, nats per token", "paper"), expect_table1),
    "table2": (("system", *TITLES, "s per sample", "paper Avg", "paper s"), expect_table2),
    "table2_paired": (
        ("pair", "points (95 %)", "seed 0", "seed 1", "seed 2", "only first", "only second", "p"),
        expect_paired,
    ),
    "table2_paper": (("system", *PAPERS["table2"]["columns"]), expect_papers),
    "seeds": (("system", "seed 0", "seed 1", "seed 2"), expect_seeds),
    "table3": (
        ("variant", "teacher's VTs", *TITLES, "- SFT", "- untrained", "paper Avg"),
        expect_table3,
    ),
    "table4": (
        ("benchmark", *(SYSTEMS[s] for s in ("opsd", "thinkmorph", "sft", "base"))),
        expect_table4,
    ),
    "table5": (
        (
            "task", "K_gen before", "K after, noise", "closed, noise, %",
            "K after, SFT from ThinkMorph", "closed, SFT from ThinkMorph, %", "K after, OPSD",
            "closed, OPSD, %", "closed, noise, paper", "closed, OPSD, paper",
        ),
        lambda: expect_closing("kl"),
    ),
    "table5_own": (
        (
            "task", "K_gen before", "K after, noise", "closed, noise, %",
            "K after, SFT from ThinkMorph", "closed, SFT from ThinkMorph, %", "K after, OPSD",
            "closed, OPSD, %",
        ),
        lambda: expect_closing("kl_own"),
    ),
    "table6": (("run", *TITLES, "gap closed, %", "paper Avg3"), expect_table6),
    "figure3a": (("visual thought", *TITLES), expect_pilot),
    "figure5": (
        (
            "task", "points (95 %)", "seed 0", "seed 1", "seed 2", "only OPSD",
            "only ThinkMorph", "p",
        ),
        lambda: [(shown(t), *paired_cells("opsd:thinkmorph", t)) for t in COLUMN_TASKS],
    ),
    "token_classes": (
        ("class", "tokens", "KL, nats per token", "share of all KL"), expect_classes,
    ),
    "token_test": (
        ("sample of", "n", "content - function words, nats (95 %)", "p"), expect_token_test,
    ),
    "controls_kl": (("task", *IN_KL), expect_kl_controls),
    "controls_accuracy": (("in the place of the VTs", *TITLES), expect_controls),
    "checkpoints": (
        ("run", "updates", "accuracy, %", "K_gen, nats per token", "gap closed, %", "choice"),
        expect_checkpoints,
    ),
    "theorem": (
        (
            "size of the noise", "forward KL: its minimiser to p*",
            "forward KL: to the arithmetic mean", "JSD: to p*", "JSD: to the arithmetic mean",
            "reverse KL: to p*", "Eq. 8 fails, %",
        ),
        expect_theorem,
    ),
}  # fmt: skip


# --- the report under test ------------------------------------------------------------------------


class Drawn:
    """In the place of eval.figures: keeps what was to be drawn, and draws nothing."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[tuple, dict]]] = {}
        for name in figures.__all__:
            setattr(self, name, self._keeper(name))

    def _keeper(self, name: str) -> Callable[..., bytes]:
        def keep(*args: Any, **named: Any) -> bytes:
            self.calls.setdefault(name, []).append((args, named))
            return PNG_HEAD + repr((args, named)).encode()

        return keep


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of results; tests that change it put it back."""
    made = tmp_path_factory.mktemp("results")
    write_results(made, FILES)
    return made


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    drawn = Drawn()
    monkeypatch.setattr(pictures, "figures", drawn)
    return drawn


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    drawn = Drawn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "figures", drawn)
        return collect(folder)[0], drawn.calls


def runs_of(folder: Path) -> Runs:
    return Runs(Results(folder), RunPlan.read(folder))


def tables_of(artefacts: Iterable[Artefact]) -> dict[str, Table]:
    return {b.name: b for a in artefacts for b in a.blocks if isinstance(b, Table)}


def same(cell: Cell, want: str | Want) -> None:
    if isinstance(want, str):
        assert cell == want
        return
    assert isinstance(cell, Number), f"{cell!r} is no number, expected {want.text}"
    assert (cell.text, cell.kind, frozenset(cell.sources)) == (want.text, want.kind, want.sources)
    assert cell.value == pytest.approx(want.value, rel=1e-12, abs=0)


def test_the_invention_has_the_fields_of_the_writers_and_no_number_twice():
    every = [
        value
        for record in (record for records in FILES.values() for record in records)
        for value in numbers_of(record["values"])
        if isinstance(value, float)
    ]
    assert len(every) > 5000 and len(set(every)) == len(every)
    for value in (record["values"] for record in FILES["seed0/pairs.json"]):
        assert set(value) == {field.name for field in fields(Pair)} | {"tasks"}
    for value in (record["values"] for record in FILES["theorem/theorem.json"]):
        assert set(value) == set(measure(1.0, [0])) | {"draws"}
    tests = [r["values"] for r in FILES["seed0/kl/tokens.json"] if r["id"] == TEST]
    assert tests and all(
        set(v) == {field.name for field in fields(Difference)} | {"measure"} for v in tests
    )
    values = pick("seed1/kl/summary.json")["values"]
    assert {*TEACHER_VTS, *CONTROLS_OF, IDENTICAL} <= set(values)
    described = Plan(MINI, "reproduction", 3).described()
    assert set(described) == set(PLAN) and described["defaults"] == PLAN["defaults"]


def numbers_of(values: Any) -> Iterator[float]:
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from numbers_of(value)
    else:
        yield values


def test_files_are_those_of_the_plan():
    """Every file that the invention has is made by a step, and of every kind that steps make."""
    steps = Plan(MINI, "n", 3).steps
    made = {file.removeprefix("results/n/") for s in steps.values() for file in s.files}
    for file in FILES:
        if "/systems/" in file or "/controls/" in file:
            folder = "/".join(file.split("/")[:2])
            assert f"{folder}/table.json" in made, file
        elif file.endswith("validation.jsonl"):
            assert file.removesuffix("/validation.jsonl") in steps
        else:
            assert file in made, file


# --- tables ---------------------------------------------------------------------------------------


def test_every_table_is_checked(whole):
    assert set(tables_of(whole[0])) == set(EXPECTED) | {"ledger", "ledger_rules"}
    assert [artefact.name for artefact in whole[0]] == list(ARTEFACTS)
    assert all(status(artefact) == "complete" for artefact in whole[0])
    assert all(not artefact.missing and not artefact.remedy for artefact in whole[0])


@pytest.mark.parametrize("name", EXPECTED)
def test_every_cell(whole, name):
    table, (header, rows) = tables_of(whole[0])[name], EXPECTED[name]
    assert table.header == header
    expected = rows()
    assert len(table.rows) == len(expected)
    for row, wanted in zip(table.rows, expected, strict=True):
        for cell, want in zip(row, wanted, strict=True):
            same(cell, want)


def test_paired_p_is_the_binomial_of_the_counts_of_all_seeds(whole):
    row = tables_of(whole[0])["table2_paired"].rows[0]
    first, second = (int(cell.value) for cell in row[5:7])
    trials = np.random.default_rng(0).binomial(first + second, 0.5, 400_000)
    middle = (first + second) / 2
    drawn = (np.abs(trials - middle) >= abs(first - middle)).mean()
    assert row[7].value == pytest.approx(drawn, abs=2e-3)


def test_one_seed_has_intervals_in_the_place_of_a_spread(folder, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"seeds": 1}), encoding="utf-8")
    for part in ("seed0", "latency"):
        shutil.copytree(folder / part, tmp_path / part)
    runs = runs_of(tmp_path)
    cell = table1(runs).rows[4][2]
    value = raw("seed0/kl/summary.json", "pre")
    same(cell, single(value, "{:.3f}"))
    main_table, paired, _ = table2(runs)
    same(main_table.rows[6][5], single(accuracy("seed0/systems/opsd/scores.json")))
    difference = raw("seed0/pairs.json", "difference", id="opsd:base").times(100)
    same(paired.rows[0][1], single(difference, "{:+.1f}"))
    assert runs.missing == {}


def test_full_size_columns_and_mean_are_the_papers(folder, tmp_path):
    assert len(PAPER) == 11
    files = {}
    for seed in SEEDS:
        for system in SYSTEMS:
            file = f"seed{seed}/systems/{system}/scores.json"
            files[file] = scores(file, PAPER, seed)
    write_results(tmp_path, FILES | files)
    table = table2(runs_of(tmp_path))[0]
    assert table.header[1:11] == (*COLUMNS, "mean") and len(COLUMNS) == 9
    doubled = {
        "ChartQA": ("ChartQA_h_bar", "ChartQA_v_bar"), "CV-Bench": ("CV-Bench-2D", "CV-Bench-3D"),
    }  # fmt: skip
    alone = {"VSP": "VSP_maze_task_main_original", "VStar": "VStarBench", "BLINK-J": "BLINK_Jigsaw",
             "SAT": "SAT_circular"}  # fmt: skip
    for row, system in zip(table.rows, SYSTEMS, strict=True):
        nine: dict[str, list[float]] = {}
        for seed in SEEDS:
            file = f"seed{seed}/systems/{system}/scores.json"
            here = []
            for column in COLUMNS:
                parts = doubled.get(column, (alone.get(column, column),))
                here.append(fmean(accuracy(file, part, files).value for part in parts))
                nine.setdefault(column, []).append(here[-1])
            nine.setdefault("mean", []).append(fmean(here))
        for cell, values in zip(row[1:11], nine.values(), strict=True):
            assert cell.text == f"{fmean(values):.1f} ± {stdev(values):.1f}"
            assert cell.value == pytest.approx(fmean(values), rel=1e-12)
    named = {source.commit for source in table.rows[0][3].sources}  # ChartQA: of both its files
    assert named == {
        pick(f"seed{seed}/systems/bagel/scores.json", part, files)["commit"]
        for seed in SEEDS
        for part in doubled["ChartQA"]
    }


def test_full_size_interval_of_the_mean_of_one_seed(tmp_path):
    file = "seed0/systems/opsd/scores.json"
    records = scores(file, PAPER, 0)
    for record in records:
        n, share = record["values"]["n"], record["values"]["accuracy"]
        low, high = wilson_interval(share, n)
        record["values"] |= {"low": low, "high": high}
    write_file(tmp_path, file, records)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"seeds": 1}), encoding="utf-8")
    row = table2(runs_of(tmp_path))[0].rows[6]
    by_task = {record["task"]: record["values"] for record in records}

    def joint(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
        n = len(estimates)
        mean = fmean(value for value, _, _ in estimates)
        below = hypot(*(value - low for value, low, _ in estimates)) / n
        return mean, mean - below, mean + hypot(*(high - value for value, _, high in estimates)) / n

    nine = [
        joint([tuple(by_task[part][k] for k in ("accuracy", "low", "high")) for part in parts])
        for parts in COLUMNS.values()
    ]
    for cell, found in zip(row[1:11], [*nine, joint(nine)], strict=True):
        value, low, high = (100 * end for end in found)
        assert cell.text == f"{value:.1f} ({low:.1f} .. {high:.1f})"


def test_two_tasks_make_a_report_without_a_radar(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "two")
    for file in FILES:
        if "/systems/" in file:
            kept = [r for r in FILES[file] if r["task"] in (*TASKS[:2], OVERALL)]
            write_file(tmp_path / "two", file, kept)
    radar, gains, pareto = pictures.figure1(runs_of(tmp_path / "two"))
    assert radar is None and gains is not None and pareto is not None
    names = table2(runs_of(tmp_path / "two"))[0].header[1:4]
    assert names == (*TITLES[:2], "mean")


# --- figures --------------------------------------------------------------------------------------


def drawn_figure(picture: Picture | None) -> Figure:
    assert picture is not None and isinstance(picture.image, Figure)
    return picture.image


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


# --- the ledger -----------------------------------------------------------------------------------

MEASURABLE = [claim for claim in CLAIMS if claim.find is not None]


def paired_text(pair: str) -> Want:
    difference, *seeds, _, _, p = paired_cells(pair)
    text = f"{difference.text}, by seed {', '.join(s.text for s in seeds)}, p {p.text}"
    return Want(text, difference.value, difference.sources)


def told(want: Want, text: str) -> Want:
    return Want(text, want.value, want.sources)


def closed_by(student: str, task: str = OVERALL) -> Want:
    return over_seeds(
        lambda s: raw(f"seed{s}/kl/summary.json", "gap_closed", student, task=task).times(100)
    )


def expect_right_pictures() -> Want:
    own = kl("pre", OVERALL)
    wrong = {t: kl(m, OVERALL) for t, m in IN_KL.items() if m not in ("pre", "identical")}
    most = max(wrong, key=lambda title: wrong[title].value)
    return told(own, f"{own.value:.3f} nats; most under {most}: {wrong[most].value:.3f}")


def expect_words() -> Want:
    content, function = (
        over_seeds(lambda s, n=name: raw(f"seed{s}/kl/tokens.json", "mean", id=n))
        for name in ("content", "function")
    )
    return told(content, f"{content.value:.3f} against {function.value:.3f} nats per token")


def expect_noise() -> Want:
    noise, real = closed_by("noise"), closed_by("opsd")
    return told(noise, f"{noise.text} %, {real.value - noise.value:.1f} points below real VTs")


def expect_faster() -> Want:
    slow, quick = (
        raw("latency/table.json", "seconds", id=id)
        for id in ("base, interleaved", "opsd, text-only")
    )
    ratio = slow.value / quick.value
    text = f"{ratio:.1f} times ({slow.value:.3f} s against {quick.value:.4f} s)"
    return Want(text, ratio, frozenset([slow.source, quick.source]))


def expect_attention(mode: str) -> Want:
    file = "attention/attention.json"
    picture, problem = (
        [raw(file, key, id=f"{mode}/txt1/{layer:02}") for layer in range(LAYERS)]
        for key in ("img1", "img0")
    )
    vt, image = (100 * fmean(v.value for v in values) for values in (picture, problem))
    return Want(
        f"{vt:.1f} % on the VT, {image:.1f} % on the problem image", vt,
        frozenset(value.source for value in picture),
    )  # fmt: skip


def expect_knob(knob: str, default: str) -> Want:
    found = {
        value: accuracy(f"sweep/systems/{run}/scores.json")
        for name, value, run in SETTINGS
        if name == knob
    }
    text = ", ".join(f"{value}: {share.value:.1f}" for value, share in found.items())
    sources = frozenset(share.source for share in found.values())
    return Want(f"{text} % (default {default})", found[default].value, sources)


def expect_ranks() -> Want:
    shares = {task: closed_by("opsd", task) for task in TASKS}
    gains = {task: minus("opsd", "base", task) for task in TASKS}
    text = "; ".join(
        f"{shown(t)}: closed {shares[t].value:.0f} %, {gains[t].value:+.0f} points" for t in TASKS
    )
    sources = frozenset().union(*(w.sources for w in (*shares.values(), *gains.values())))
    return Want(text, shares[TASKS[0]].value, sources)


def expect_theorem_claim() -> Want:
    key, tasks = "forward KL, to p*", [r["task"] for r in FILES["theorem/theorem.json"]]
    found = max((raw("theorem/theorem.json", key, task=t) for t in tasks), key=lambda v: v.value)
    text = f"up to {found.value:.2g} from p* in total variation"
    return Want(text, found.value, frozenset([found.source]))


def with_unit(want: Want, unit: str) -> Want:
    return told(want, f"{want.text} {unit}")


FOUND: tuple[Callable[[], Want], ...] = (  # in the order of the claims
    lambda: with_unit(kl("pre", OVERALL), "nats per token"),
    expect_right_pictures,
    expect_words,
    lambda: with_unit(closed_by("opsd"), "%"),
    expect_noise,
    lambda: paired_text("opsd:base"),
    lambda: paired_text("opsd:sft"),
    lambda: paired_text("opsd:sft_base"),
    lambda: paired_text("opsd:noise"),
    lambda: paired_text("noise:sft"),
    lambda: paired_text("noise:base"),
    lambda: paired_text("opsd:thinkmorph"),
    expect_faster,
    lambda: with_unit(minus("base", "thinkmorph"), "points"),
    lambda: with_unit(minus("thinkmorph-noise", "thinkmorph"), "points"),
    lambda: expect_attention("drawn"),
    lambda: expect_attention("noise"),
    lambda: expect_knob("jsd_top_k", "64"),
    lambda: expect_knob("jsd_token_clip", "0"),
    expect_ranks,
    expect_theorem_claim,
)


def test_ledger_has_the_numbers_of_every_claim(whole):
    tables = tables_of(whole[0])
    assert len(tables["ledger"].rows) == len(tables["ledger_rules"].rows) == len(CLAIMS)
    wants = iter(FOUND)
    for place, (claim, row, rule) in enumerate(
        zip(CLAIMS, tables["ledger"].rows, tables["ledger_rules"].rows, strict=True), 1
    ):
        assert row[:2] == (f"{place}. {claim.text}", claim.value)
        assert rule[:2] == (f"{place}. {claim.text}", claim.place)
        if claim.find is None:
            assert row[2:] == ("–", "not run at this scale")
            assert rule[2:] == ("–", claim.differs) and claim.differs
            continue
        same(row[2], next(wants)())
        assert row[3] in ("holds", "differs")
        reason = claim.holds if row[3] == "holds" else claim.differs
        assert rule[3] == f"Holds if {claim.rule}. {reason}".strip()
        assert rule[2].startswith(f"{PLAN['command']} --only {claim.needs}; ")
        assert "3 seeds" in rule[2] and claim.needs in ARTEFACTS
    assert next(wants, None) is None


Change = tuple[str, tuple[str, ...], float, dict[str, Any]]  # file, keys, new value, which records


def in_kl(values: Mapping[tuple[str, ...], float], task: str = OVERALL) -> list[Change]:
    return [
        (f"seed{s}/kl/summary.json", keys, value, {"task": task})
        for s in SEEDS
        for keys, value in values.items()
    ]


def in_pairs(pair: str, value: float, low: float, high: float) -> list[Change]:
    ends = {"value": value, "low": low, "high": high}
    return [
        (f"seed{s}/pairs.json", ("difference", name), end, {"id": pair, "task": OVERALL})
        for s in SEEDS
        for name, end in ends.items()
    ]


ROOT3 = 3**0.5  # intervals of three equal estimates are that much narrower


def above_zero(pair: str) -> list[tuple[list[Change], bool]]:
    return [(in_pairs(pair, 0.1, 0.1 - ROOT3 * (0.1 - low), 0.2), low > 0) for low in (1e-4, -1e-4)]


def in_scores(values: Mapping[str, float], task: str = OVERALL) -> list[Change]:
    return [
        (f"seed{s}/systems/{system}/scores.json", ("accuracy",), value, {"task": task})
        for s in SEEDS
        for system, value in values.items()
    ]


def beside_drawing(system: str) -> list[tuple[list[Change], bool]]:
    return [
        (in_scores({"thinkmorph": 0.5, system: 0.5 + d}), abs(d) < 0.05)
        for d in (0.0499, 0.0501, -0.0499, -0.0501)
    ]


def attended(mode: str) -> list[tuple[list[Change], bool]]:
    file, other = "attention/attention.json", "true"
    return [
        (
            [
                (file, ("img1",), value, {"id": f"{name}/txt1/{layer:02}", "task": OVERALL})
                for name, value in ((mode, share), (other, 1 - share))
                for layer in range(LAYERS)
            ],
            share > 0.5,
        )
        for share in (0.501, 0.499)
    ]


def knob_moved(knob: str, moved: str) -> list[tuple[list[Change], bool]]:
    """One value of the knob away from the default, which the others are at."""
    runs = [run for name, _, run in SETTINGS if name == knob]
    return [
        (
            [
                (
                    f"sweep/systems/{run}/scores.json", ("accuracy",),
                    0.5 + (d if run == moved else 0), {"task": OVERALL},
                )
                for run in runs
            ],
            abs(d) < 0.05,
        )
        for d in (0.0499, 0.0501, -0.0501)
    ]  # fmt: skip


def ranked(gains: Sequence[float]) -> list[Change]:
    changes = []
    for place, (task, gain) in enumerate(zip(TASKS, gains, strict=True)):
        changes += in_kl({("gap_closed", "opsd", "value"): 0.1 * place}, task)
        changes += in_scores({"base": 0.3, "opsd": 0.3 + gain}, task)
    return changes


def seconds_of(slow: float) -> list[Change]:
    file, found = "latency/table.json", {"base, interleaved": slow, "opsd, text-only": 1.0}
    return [(file, ("seconds",), value, {"id": id}) for id, value in found.items()]


def distances(largest: float) -> list[Change]:
    file, tasks = "theorem/theorem.json", ["noise 0.1", "noise 0.5", "noise 1.0", "noise 2.0"]
    values = dict.fromkeys(tasks, 0.0) | {"noise 1.0": largest}
    return [(file, ("forward KL, to p*",), v, {"task": task}) for task, v in values.items()]


def closed_both(noise: float, real: float) -> list[Change]:
    keys = (("gap_closed", "noise", "value"), ("gap_closed", "opsd", "value"))
    return in_kl(dict(zip(keys, (noise, real), strict=True)))


def most_moved(own: float) -> list[Change]:
    wrong = {(m, "value"): 1.0 for m in IN_KL.values() if m != "identical"}
    return in_kl(wrong | {("pre", "value"): own, ("identical", "value"): 5.0})


def words(content: float) -> list[Change]:
    return [
        (f"seed{s}/kl/tokens.json", ("mean",), value, {"id": name, "task": OVERALL})
        for s in SEEDS
        for name, value in (("content", content), ("function", 1.0))
    ]


def one_seed_low(low: float) -> list[Change]:
    return [("seed1/kl/summary.json", ("pre", "low"), low, {"task": OVERALL})]


BOTH_SIDES: tuple[list[tuple[list[Change], bool]], ...] = (  # in the order of the claims
    [(one_seed_low(1e-4), True), (one_seed_low(-1e-4), False)],
    [(most_moved(1.001), True), (most_moved(0.999), False)],
    [(words(1.001), True), (words(0.999), False)],
    [(closed_both(0.0, 0.501), True), (closed_both(0.0, 0.499), False)],
    [
        (closed_both(0.149, 0.6), True), (closed_both(0.151, 0.6), False),
        (closed_both(-0.149, 0.6), True), (closed_both(-0.151, 0.6), False),
        (closed_both(0.1, 0.501), True), (closed_both(0.1, 0.499), False),
    ],
    above_zero("opsd:base"),
    above_zero("opsd:sft"),
    above_zero("opsd:sft_base"),
    above_zero("opsd:noise"),
    [(in_pairs("noise:sft", d, -0.9, 0.9), abs(d) < 0.05) for d in (0.0499, 0.0501, -0.0501)],
    [
        (in_pairs("noise:base", -0.1, -0.2, -0.1 + ROOT3 * (0.1 + high)), high < 0)
        for high in (1e-4, -1e-4)
    ],
    above_zero("opsd:thinkmorph"),
    [(seconds_of(5.01), True), (seconds_of(4.99), False)],
    beside_drawing("base"),
    beside_drawing("thinkmorph-noise"),
    attended("drawn"),
    attended("noise"),
    knob_moved("jsd_top_k", "jsd_top_k-128"),
    knob_moved("jsd_token_clip", "jsd_token_clip-0.1"),
    [(ranked([0.1, 0.2, 0.3, 0.4]), True), (ranked([0.1, 0.3, 0.2, 0.4]), False)],
    [(distances(9e-7), True), (distances(1.1e-6), False)],
)  # fmt: skip


def changed(changes: Sequence[Change]) -> Files:
    """The files that changes touch, changed."""
    files: Files = {}
    for file, keys, value, which in changes:
        if file not in files:
            files[file] = json.loads(json.dumps(FILES[file]))
        holder = pick(file, **({"task": OVERALL} | which), files=files)["values"]
        for key in keys[:-1]:
            holder = holder[key]
        assert keys[-1] in holder
        holder[keys[-1]] = value
    return files


@pytest.mark.parametrize("place", range(len(MEASURABLE)))
def test_status_follows_the_numbers_across_the_rule(folder, place):
    claim: Claim = MEASURABLE[place]
    assert {holds for _, holds in BOTH_SIDES[place]} == {True, False}
    for changes, holds in BOTH_SIDES[place]:
        files = changed(changes)
        try:
            for file, records in files.items():
                write_file(folder, file, records)
            assert claim.find(runs_of(folder)).holds is holds, (claim.text, changes[:2])
        finally:
            for file in files:
                write_file(folder, file, FILES[file])


def test_every_claim_has_its_numbers_and_both_sides():
    assert len(FOUND) == len(BOTH_SIDES) == len(MEASURABLE)


# --- what is not there ----------------------------------------------------------------------------


def rows_of(artefacts: Iterable[Artefact]) -> dict[tuple[str, str], dict[str, Cell]]:
    """(table, title of the row) -> column -> cell."""
    found = {}
    for table in tables_of(artefacts).values():
        for row in table.rows:
            leading = [*takewhile(lambda cell: isinstance(cell, str), row)]
            title = " | ".join(leading[:2]) if table.name == "checkpoints" else str(row[0])
            assert (table.name, title) not in found
            found[table.name, title] = dict(zip(table.header, row, strict=True))
    return found


def uses(cell: Cell, file: str) -> bool:
    return isinstance(cell, Number) and file in {source.file for source in cell.sources}


def is_missing(cell: Cell | None) -> bool:
    return cell is None or (
        isinstance(cell, Number)
        and (cell.text, cell.value, cell.kind) == ("not run", None, "missing")
    )


def check_rows(before: Iterable[Artefact], after: Iterable[Artefact], lost: str) -> set[str]:
    """Compare all cells; returns the tables that a lost file took something from."""
    old, new, touched = rows_of(before), rows_of(after), set()
    for (table, title), row in old.items():
        now = new.get((table, title))
        if not any(uses(cell, lost) for cell in row.values()):
            if table != "ledger_rules":
                assert now == row, (table, title)
            continue
        touched.add(table)
        for column, cell in row.items():
            there = None if now is None else now.get(column)
            if uses(cell, lost):
                assert is_missing(there), (table, title, column, there)
            elif isinstance(cell, Number) and cell.kind == "measured":
                assert there == cell, (table, title, column)
        if table == "ledger":
            assert now is not None and now["status"] == "not run"
            assert "no results" in new["ledger_rules", title]["rule and reason"]
    for (table, title), row in new.items():
        assert not any(uses(cell, lost) for cell in row.values())
        assert (table, title) in old or all(
            isinstance(c, str) or c.kind == "missing" for c in row.values()
        )
    for table in touched:
        rows = [row for (name, _), row in new.items() if name == table]
        assert any(is_missing(cell) for row in rows for cell in row.values()), table
    return touched


def beside(artefact: Artefact) -> dict[str, Picture | Text]:
    """Its pictures and texts by name."""
    return {
        b.name if isinstance(b, Picture) else b.title: b
        for b in artefact.blocks
        if not isinstance(b, Table)
    }


@contextmanager
def without(folder: Path, aside: Path, lost: str) -> Iterator[None]:
    """A file moved away for a while."""
    (folder / lost).rename(aside / "lost")
    try:
        yield
    finally:
        (aside / "lost").rename(folder / lost)


def lost_of(artefact: Artefact, lost: str) -> bool:
    """Whether anything of it comes from a file."""
    cells = [c for b in artefact.blocks if isinstance(b, Table) for row in b.rows for c in row]
    return any(uses(cell, lost) for cell in cells) or any(
        lost in {source.file for source in block.sources} for block in beside(artefact).values()
    )


@pytest.mark.parametrize("lost", FILES)
def test_a_lost_file_is_not_run_and_nothing_else_changes(folder, tmp_path, whole, drawn, lost):
    with without(folder, tmp_path, lost):
        after = collect(folder)[0]
    check_rows(whole[0], after, lost)
    hit = [artefact.name for artefact in whole[0] if lost_of(artefact, lost)]
    assert hit, f"nothing is made of {lost}"
    for old, new in zip(whole[0], after, strict=True):
        if old.name not in hit:
            assert new == old
            continue
        assert any(entry.startswith(lost) for entry in new.missing)
        assert all(entry.startswith(lost) for entry in new.missing)
        assert new.remedy == f"{PLAN['command']} --only {new.name}"
        assert status(new) in ("partly", "not run")
        kept = beside(new)
        assert set(kept) <= set(beside(old))
        for name, block in beside(old).items():
            used = lost in {source.file for source in block.sources}
            assert used or kept[name] == block, (new.name, name)
            assert name not in kept or lost not in {s.file for s in kept[name].sources}


@pytest.mark.parametrize("lost", PICTURES)
def test_a_lost_picture_of_a_case_is_named_and_not_described(folder, tmp_path, whole, drawn, lost):
    with without(folder, tmp_path, lost):
        after = collect(folder)[0]
    for old, new in zip(whole[0], after, strict=True):
        if old.name != "cases":
            assert new == old
            continue
        assert new.missing == (lost,)
        assert new.remedy == f"{PLAN['command']} --only cases"
        told = {"-problem-": "1 problem", "-true-": "1 true", "-thinkmorph-": "1 drawn"}
        (gone,) = [text for part, text in told.items() if part in lost]
        strips = [block for block in new.blocks if isinstance(block, Picture)]
        strip = strips[PICTURES.index(lost) // 3]  # of each case three pictures
        assert [text for text in told.values() if text in strip.alt] == [
            text for text in told.values() if text != gone
        ]


def test_nothing_run_is_not_run_everywhere(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    main([str(tmp_path)])
    artefacts, results = collect(tmp_path)
    assert results.read == []
    for artefact in artefacts:
        assert status(artefact) == "not run", artefact.name
        assert artefact.remedy == f"{PLAN['command']} --only {artefact.name}"
        assert beside(artefact) == {}
        cells = [c for b in artefact.blocks if isinstance(b, Table) for row in b.rows for c in row]
        assert not any(isinstance(cell, Number) and cell.kind == "measured" for cell in cells)
    for table in tables_of(artefacts).values():
        if table.name not in ("table2_paper", "ledger_rules"):
            assert any(is_missing(cell) for row in table.rows for cell in row), table.name
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert page.count("status: **not run**") == len(ARTEFACTS)
    assert not list((tmp_path / "report").glob("figures/*"))


# --- the command ----------------------------------------------------------------------------------

TEXTS = ("report/report.md", "report/report.html")


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the results with things beside that no report reads; what was published of it."""
    place = tmp_path_factory.mktemp("published")
    shutil.copytree(folder, place / "runs")
    for file in ("steps/theorem.json", "seed0/kl/records.jsonl", "seed0/opsd/metrics.jsonl"):
        (place / "runs" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "runs" / file).write_text("[]", encoding="utf-8")
    ledger = str(place / "ledger.md")
    main([str(place / "runs"), "--publish", str(place / "copy"), "--ledger", ledger])
    return place / "runs", place / "copy"


def test_published_is_what_was_read_and_its_report_is_the_same(published):
    runs, copy = (written(folder) for folder in published)
    copied = {name for name in copy if not name.startswith("report/")}
    assert copied == {*FILES, *PICTURES, "plan.json", "microscope/microscope.html"}
    assert all(copy[name] == runs[name] for name in copied)
    tables = {name for name in runs if name.startswith("report/tables/")}
    assert len(tables) == len(EXPECTED) + 2
    for name in copy.keys() - copied | tables:
        assert copy[name] == runs[name], name


def test_two_runs_write_the_same_bytes(published):
    before = written(published[0])
    main([str(published[0])])
    after = written(published[0])
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert {*TEXTS} <= set(before)


def test_csv_holds_the_unrounded_numbers_and_their_files(published):
    text = (published[1] / "report/tables/table1.csv").read_text(encoding="utf-8").splitlines()
    want = kl("pre", OVERALL)
    name, n, k, paper, columns, sources = text[5].split(",")
    assert (name, float(k), paper, columns) == ("overall", want.value, "4.64", "paper")
    assert sources.split("; ") == [f"seed{seed}/kl/summary.json" for seed in SEEDS]
    assert float(n) == expect_table1()[4][1].value


def test_ledger_document_names_value_status_and_origin_of_each_claim(published):
    runs, copy = published
    text = (runs.parent / "ledger.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    assert len(sections) == len(CLAIMS)
    wants = iter(FOUND)
    for section, claim in zip(sections, CLAIMS, strict=True):
        assert claim.text in section.splitlines()[0]
        if claim.find is None:
            assert "**not run at this scale.**" in section and "- from" not in section
            continue
        want, holds = next(wants)(), claim.find(runs_of(copy)).holds
        assert f"**{'holds' if holds else 'differs'}.**" in section
        assert want.text.split(" ")[0] in section
        for source in want.sources:
            line = f"- from `{copy / source.file}`, seed {source.seed}, commit {source.commit[:10]}"
            assert line in section.splitlines()


def test_publishing_again_replaces_an_earlier_copy(published, tmp_path, drawn):
    shutil.copytree(published[1], tmp_path / "copy")
    (tmp_path / "copy" / "seed0" / "old.json").write_text("[]", encoding="utf-8")
    publish(published[0], tmp_path / "copy")
    again, first = written(tmp_path / "copy"), written(published[1])
    assert again.keys() == first.keys()
    same_now = {name for name in first if again[name] == first[name]}
    assert {name for name in first if name not in TEXTS and "/figures/" not in name} <= same_now


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "Traceback" not in said
    return said


@pytest.mark.parametrize("kind", ["foreign", "itself", "parent", "runs", "file"])
def test_nothing_is_deleted_that_is_no_earlier_copy(published, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("eval.report.report", lambda folder: folder)  # it is written elsewhere here
    ignored = shutil.ignore_patterns("report", "steps")
    shutil.copytree(published[0], tmp_path / "in" / "runs", ignore=ignored)
    target = {
        "foreign": tmp_path / "foreign", "itself": tmp_path / "in" / "runs",
        "parent": tmp_path / "in", "runs": tmp_path / "other", "file": tmp_path / "file",
    }[kind]  # fmt: skip
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "in" / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    (tmp_path / "other" / "steps").mkdir(parents=True)
    (tmp_path / "other" / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    before = written(tmp_path)
    said = refused(capsys, str(tmp_path / "in" / "runs"), "--publish", str(target))
    assert str(target) in said
    assert written(tmp_path) == before


def test_a_folder_without_a_plan_is_one_line(tmp_path, capsys):
    said = refused(capsys, str(tmp_path))
    assert "plan.json is missing" in said
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn_around_what_is_missing(folder, tmp_path):
    """One file of every kind less: figures are drawn, and say so."""
    shutil.copytree(folder, tmp_path / "less")
    lost = (
        "seed1/systems/thinkmorph-none/scores.json", "seed2/systems/sft/scores.json",
        "seed0/noise/validation.jsonl", "sweep/systems/jsd_beta-1/scores.json",
    )  # fmt: skip
    for file in lost:
        (tmp_path / "less" / file).unlink()
    file = "latency/table.json"
    write_file(tmp_path / "less", file, [r for r in FILES[file] if r["id"] != "sft, text-only"])
    file = "attention/attention.json"
    kept = [r for r in FILES[file] if not r["id"].startswith("noise/")]
    write_file(tmp_path / "less", file, kept)
    artefacts, _ = collect(tmp_path / "less")
    known = {p.name for a in artefacts for p in beside(a).values() if isinstance(p, Picture)}
    assert {"figure1a", "figure1c", "figure3a", "figure3b", "figure7b", "table6"} <= known
    assert "figure7a" not in known  # no bar of it was run
    for artefact in artefacts:
        for picture in beside(artefact).values():
            if isinstance(picture, Picture) and isinstance(picture.image, Figure):
                texts = [text.get_text() for axis in picture.image.axes for text in axis.texts]
                texts += [axis.get_title(loc="left") for axis in picture.image.axes]
                texts += [t.get_text() for leg in picture.image.legends for t in leg.get_texts()]
                texts += [text.get_text() for text in picture.image.texts]
                told = "not run" in " ".join(texts).lower()
                absent = picture.name in {
                    "figure1c", "figure3a", "figure3b", "figure7b", "table6",
                    "learning_accuracy", "learning_k_gen",
                }  # fmt: skip
                assert told == absent, picture.name
