"""Every cell of every table of the report, from invented results against plain sums; what a table
says where runs are short, old, of another scale or share their questions.
"""

import ast
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import yaml

from data.miniworld.world import TASKS
from eval.artefacts import pictures
from eval.artefacts.catalogue import ARTEFACTS
from eval.artefacts.extras import HEALTH, checkpoints, health, pilot
from eval.artefacts.markdown import status
from eval.artefacts.model import Artefact, Number
from eval.artefacts.tables import latency, paired_table, table1, table2
from eval.experiments import MINI, PAIRS, Plan
from eval.files.registry import COLUMNS, PAPER
from eval.interleaved import Timing, table_rows
from eval.kl_scoring import CONTROLS_OF, IDENTICAL, TEACHER_VTS
from eval.pairs import Pair
from eval.sample import Question, Sample
from eval.statistics import wilson_interval
from eval.theorem import measure
from eval.token_classes import TEST, Difference
from tests.invented_results import (
    ARMS,
    CLASSES,
    COLUMN_TASKS,
    FILES,
    IN_KL,
    LAYERS,
    METRICS,
    OVERALL,
    PILOT,
    PLAN,
    SEEDS,
    SETTINGS,
    STEPS,
    TITLES,
    WATCHED,
    Raw,
    Want,
    accuracy,
    by_seed,
    chosen_step,
    collected,
    drawn_figure,
    is_missing,
    kl,
    made,
    minus,
    origin,
    over_seeds,
    paired_cells,
    pick,
    planned,
    raw,
    runs_of,
    same,
    scores,
    shown,
    single,
    small,
    tables_of,
    write_file,
    write_results,
    written_for_a_while,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Invented results; tests that change them put them back."""
    return made(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    return collected(folder)


PAPERS = yaml.safe_load(Path("eval/artefacts/paper.yaml").read_text(encoding="utf-8"))


def papers(value: float, form: str = "{:.2f}") -> Want:
    return Want(form.format(value), value, kind="paper")


BY_CATEGORY = ("Visual_Search", "Spatial_Navigation", "Chart_Refocus", "Jigsaw_Assembly", OVERALL)


TITLED = {
    "bagel": "BAGEL: before it drew",
    "thinkmorph": "ThinkMorph: draws its VTs",
    "base": "ThinkMorph, text-only: the untrained student",
    "sft": "text-only SFT, from BAGEL",
    "sft_base": "text-only SFT, from ThinkMorph",
    "noise": "Visual-OPSD-Noise",
    "opsd": "Visual-OPSD",
}


Rows = list[tuple[str | Want, ...]]


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
        "noise": "noise, text-only", "opsd": "opsd, text-only",
    }  # fmt: skip
    rows = []
    for system, title in TITLED.items():
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


def expect_paired() -> Rows:
    pairs = dict.fromkeys(record["id"] for record in FILES["seed0/pairs.json"])
    assert len(pairs) == 10
    return [(" - ".join(pair.split(":")), *paired_cells(pair)) for pair in pairs]


def expect_papers() -> Rows:
    systems = ("bagel", "thinkmorph", "sft", "noise", "opsd")
    return [(TITLED[s], *map(papers, PAPERS["table2"][s])) for s in systems]


def expect_seeds() -> Rows:
    return [
        (title, *(single(accuracy(f"seed{seed}/systems/{s}/scores.json")) for seed in SEEDS))
        for s, title in TITLED.items()
    ]


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
    return [
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


def expect_papers_table4() -> Rows:
    rows = [(task, *(papers(v, "{:.1f}") for v in row)) for task, row in PAPERS["table4"].items()]
    assert [len(row) for row in rows] == [4] * 11
    return rows


def expect_papers_table5() -> Rows:
    rows = []
    for task in BY_CATEGORY:
        before, noise, opsd = PAPERS["table5"][task]
        shares = PAPERS["closed"][task]
        for after, share in ((noise, shares[0]), (opsd, shares[1])):  # Eq. 9 of what is printed
            assert 100 * (1 - after / before) == pytest.approx(share, abs=0.06)
        cells = (*map(papers, (before, noise, opsd)), *(papers(s, "{:.1f}") for s in shares))
        rows.append((shown(task), *cells))
    return rows


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
        rows.append((shown(task), *cells))
    return rows


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


def expect_latency() -> Rows:
    file, rows = "latency/table.json", []
    for record in FILES[file]:
        values, name = record["values"], record["id"]
        speed = Raw(values["tokens"] / values["seconds"], origin(file, record))
        cells = [
            single(raw(file, "seconds", id=name), "{:.4f}"),
            single(raw(file, "ratio", id=name)),
            single(raw(file, "tokens", id=name)),
            single(speed, "{:.0f}"),
        ]
        drawing = values["drawing"]
        if name.startswith("base, interleaved"):
            keys = ("num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale")
            size = f"{values['picture_width']} x {values['picture_height']}"
            rows.append((name, *cells, size, *(str(drawing[key]) for key in keys)))
        else:
            assert drawing is None
            rows.append((name, *cells, *["–"] * 5))
    assert len(rows) == 6 and rows[1][5] != rows[0][5] != "–"
    return rows


def expect_attention_table() -> Rows:
    file, rows = "attention/attention.json", []
    titles = {"drawn": "its own drawing", "noise": "noise", "shuffled": "another problem's VT"}
    for mode, title in titles.items():
        for layer in range(LAYERS):
            id = f"{mode}/txt1/{layer:02}"
            ends = pick(file, id=id)["values"]
            cells = []
            for key in ("img1", "img0"):
                share, even = (raw(file, *keys, id=id) for keys in ((key,), ("uniform", key)))
                ranged = Raw(share.value, share.source, ends["low"][key], ends["high"][key])
                cells += [single(ranged.times(100)), single(even.times(100))]
            rows.append((f"{title}, layer {layer + 1}", *cells))
    return rows


LAST = {  # title -> metric, form
    "K_gen, on-policy": ("k_gen", "{:.3f}"),
    "entropy": ("student_entropy", "{:.3f}"),
    "mass outside K": ("student_mass_outside", "{:.4f}"),
    "clipped": ("clipped_share", "{:.3f}"),
    "tokens": ("completion_length", "{:.1f}"),
    "cut off": ("ended_by_budget", "{:.3f}"),
    "empty": ("empty_completions", "{:.3f}"),
    "image skips": ("image_skips", "{:.3f}"),
    "over the cap": ("over_cap", "{:.3f}"),
    "unusable rows": ("skipped_records", "{:.3f}"),
    "teacher drift": ("teacher_drift", "{:.4f}"),
}


LIGHTS = (("yellow", 1), ("red", 2), ("green", 0))  # of each seed, as they were invented


def expect_health() -> Rows:
    """The last line that is no validation; what wrote it stands in the validations."""
    rows = []
    for arm in ARMS:
        for seed in SEEDS:
            file, beside = (f"seed{seed}/{arm}/{name}.jsonl" for name in ("metrics", "validation"))
            (line,) = [
                line for line in METRICS[file] if line["step"] == STEPS[-1] and "k_gen" in line
            ]
            wrote = FILES[beside][0]
            sources = frozenset([origin(file, wrote), origin(beside, wrote)])
            cells = [Want(f.format(line[m]), line[m], sources) for m, f in LAST.values()]
            rows.append((f"{arm}, seed {seed}", *cells, Want(*LIGHTS[seed], sources)))
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
        ("benchmark", *(TITLED[s] for s in ("opsd", "thinkmorph", "sft", "base"))),
        expect_table4,
    ),
    "table4_paper": (
        ("benchmark", *(TITLED[s] for s in ("opsd", "thinkmorph", "sft"))),
        expect_papers_table4,
    ),
    "table5": (
        (
            "task", "K_gen before", "K after, noise", "closed, noise, %",
            "K after, SFT from ThinkMorph", "closed, SFT from ThinkMorph, %", "K after, OPSD",
            "closed, OPSD, %",
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
    "table5_paper": (
        (
            "task", "K_gen before", "K after, noise", "K after, OPSD", "closed, noise, %",
            "closed, OPSD, %",
        ),
        expect_papers_table5,
    ),
    "table6": (("run", *TITLES, "gap closed, %", "paper, mean of 3"), expect_table6),
    "figure3a": (("visual thought", *TITLES), expect_pilot),
    "figure3b": (
        (
            "picture", "on it, %", "even spread, %", "on the problem, %",
            "even spread, %, problem",
        ),
        expect_attention_table,
    ),
    "latency": (
        (
            "system", "s per sample", "times the last", "tokens", "tokens per s", "picture",
            "grid points", "shift", "guidance, text", "guidance, image",
        ),
        expect_latency,
    ),
    "health": (("run", *LAST, "sentinel, worst"), expect_health),
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


def test_the_invention_has_the_fields_of_the_writers_and_no_number_twice():
    every = [
        value
        for record in (record for records in FILES.values() for record in records)
        for value in numbers_of(record["values"])
        if isinstance(value, float)
    ]
    every += [line[name] for lines in METRICS.values() for line in lines for name in WATCHED
              if name in line]  # fmt: skip
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
    seconds = {"a": [1.0]}
    written = table_rows({"a": {OVERALL: TASK_SCORES}}, [Timing(SAMPLE, seconds)])["a"]
    for value in (record["values"] for record in FILES["latency/table.json"]):
        assert set(value) == set(written) | {"drawing"}
    described = Plan(MINI, "reproduction", 3).described()
    assert set(described) == set(PLAN) and described["defaults"] == PLAN["defaults"]


TASK_SCORES = {
    "n": 4, "accuracy": 0.5, "low": 0.2, "high": 0.8, "mean_tokens": 9.0, "mean_pictures": 1.0,
    "picture_width": 64, "picture_height": 64, "seconds_per_sample": 1.0,
}  # fmt: skip


SAMPLE = Sample("a", "row-0", (), Question("match", "1"))


def test_training_writes_the_metrics_of_the_invention():
    """Each is a name that the trainer gives to its metrics."""
    names = set()
    for file in ("train/opsd.py", "train/session.py"):
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg:
                names.add(node.arg)
            if isinstance(node, ast.Constant):
                names.add(node.value)
    assert set(WATCHED) <= names
    assert {metric for metric, _ in LAST.values()} == set(HEALTH) <= set(WATCHED)


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


def test_seeds_that_share_their_questions_have_no_more_of_them(folder):
    """Interval and p are not those of three times as many questions; the points stay."""
    own, shared = planned(folder), planned(folder, own_questions=False)
    for before, after in zip(
        paired_table(own, "pairs", PAIRS).rows,
        paired_table(shared, "pairs", PAIRS).rows,
        strict=True,
    ):
        pair = str(after[0]).replace(" - ", ":")
        found = [pick(f"seed{seed}/pairs.json", id=pair)["values"] for seed in SEEDS]
        low, high = (100 * fmean(v["difference"][end] for v in found) for end in ("low", "high"))
        mean, p = before[1].value, max(values["p"] for values in found)
        want = Want(f"{mean:+.1f} ({low:+.1f} .. {high:+.1f})", mean, frozenset(before[1].sources))
        same(after[1], want)
        same(after[-1], Want(small(p), p, frozenset(before[1].sources)))
        assert after[2:-1] == before[2:-1]


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_that_did_not_come_to_its_end_is_not_run(folder, arm):
    """One update short of the plan, both tables and the curves say so; at the plan they do not."""
    short, complete = planned(folder, steps=STEPS[-1] + 1), planned(folder)
    for build in (checkpoints, health):
        rows = {row[0]: row for row in build(short).rows}
        assert len(rows) == len(ARMS) * len(SEEDS)
        for seed in SEEDS:
            cells = [c for c in rows[f"{arm}, seed {seed}"][1:] if isinstance(c, Number)]
            assert cells and all(map(is_missing, cells))
        assert not any(is_missing(cell) for row in build(complete).rows for cell in row)
    files = ("metrics.jsonl", "validation.jsonl")
    named = {f"seed{s}/{arm}/{file}: update 76" for s in SEEDS for file in files}
    assert named <= set(short.missing) and not complete.missing
    assert pictures.learning(short) == [None, None]
    assert pictures.live_gap(short) == [None, None]


@pytest.mark.parametrize("value", [None, "left out"])
def test_a_metric_without_a_value_is_one_cell_not_run(folder, value):
    file = "seed1/opsd/metrics.jsonl"
    lines = json.loads(json.dumps(METRICS[file]))
    last = next(line for line in reversed(lines) if "k_gen" in line)
    if value is None:
        last["clipped_share"] = None  # what had no number, for JSON has no NaN
    else:
        del last["clipped_share"]
    with written_for_a_while(folder, {file: lines}):
        runs = runs_of(folder)
        row = dict(zip(["run", *LAST, "light"], health(runs).rows[1], strict=True))
    assert row["run"] == "opsd, seed 1" and is_missing(row["clipped"])
    assert [name for name, cell in row.items() if name != "run" and is_missing(cell)] == ["clipped"]
    assert list(runs.missing) == [f"{file}: clipped_share"]


@pytest.mark.parametrize("where", ["sentinel", "val/sentinel"])
@pytest.mark.parametrize("light, name", [(0.0, "green"), (1.0, "yellow"), (2.0, "red")])
def test_the_worst_light_of_a_run_is_shown(folder, where, light, name):
    file = "seed2/noise/metrics.jsonl"
    lines = json.loads(json.dumps(METRICS[file]))
    next(line for line in lines if where in line)[where] = light
    with written_for_a_while(folder, {file: lines}):
        cell = health(runs_of(folder)).rows[5][-1]
    assert (cell.text, cell.value) == (name, light)


def test_seconds_that_do_not_name_their_settings_are_not_in_the_table_of_settings(folder):
    file = "latency/table.json"
    old = json.loads(json.dumps(FILES[file]))
    for record in old:
        del record["values"]["drawing"]
    with written_for_a_while(folder, {file: old}):
        runs = runs_of(folder)
        table = latency(runs)
        assert isinstance(table2(runs)[0].rows[6][6], Number)
        same(table2(runs)[0].rows[6][6], expect_table2()[6][6])
    assert len(table.rows) == 1 and all(is_missing(cell) for cell in table.rows[0][1:])
    assert list(runs.missing) == [f"{file}: drawing"]


def test_pictures_of_other_rows_are_no_condition_where_others_were_asked(folder):
    """The benchmarks have no visual thoughts to shuffle; the row of the data sets is not theirs."""
    title, files = "shown another problem's", {}
    for seed in SEEDS:
        for system in TITLED | {"thinkmorph-noise": "", "thinkmorph-none": ""}:
            file = f"seed{seed}/systems/{system}/scores.json"
            files[file] = scores(file, PAPER, seed)
    assert title in [row[0] for row in pilot(runs_of(folder)).rows]
    with written_for_a_while(folder, files):
        runs = runs_of(folder)
        assert [row[0] for row in pilot(runs).rows] == [t for t in PILOT if t != title]
        figure = drawn_figure(pictures.figure3a(runs))
        assert title not in [text.get_text() for text in figure.legends[0].get_texts()]
        assert not runs.missing


def test_full_size_columns_and_mean_are_the_papers(folder, tmp_path):
    assert len(PAPER) == 11
    files = {}
    for seed in SEEDS:
        for system in TITLED:
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
    for row, system in zip(table.rows, TITLED, strict=True):
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
