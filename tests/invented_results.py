"""An invented folder of results: every file that the report reads, and no number twice; and, below,
what a report of it is held against.

The records have the fields that the commands write; test_artefacts.py holds them against those
commands. Their numbers are drawn from a hash of where they stand, so that a number read from a
wrong file, task or field is another number.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import PIL.Image
import pytest
from matplotlib.figure import Figure

from data.miniworld.world import TASKS
from eval import figures
from eval.artefacts import pictures
from eval.artefacts.model import Artefact, Cell, Number, Picture, Source, Table, Text
from eval.artefacts.results import Results
from eval.artefacts.runs import RunPlan, Runs
from eval.artefacts.write import PNG_HEAD
from eval.attention import SOURCES, TEXTS, TOTALS
from eval.experiments import PAIRS
from eval.protocol import Drawing
from eval.report import collect
from eval.statistics import mcnemar
from eval.theorem import BETAS, NOISES
from train.records import base_record

Record = dict[str, Any]
Files = dict[str, list[Record]]

OVERALL = "overall"
SEEDS = range(3)
SYSTEMS = (
    "bagel", "base", "noise", "opsd", "sft", "sft_base", "thinkmorph", "thinkmorph-noise",
    "thinkmorph-none",
)  # fmt: skip
CONTROLS = (
    "base", "prompts-only", "teacher", "teacher-blank", "teacher-crop", "teacher-noise",
    "teacher-problem", "teacher-shuffled", "thinkmorph-shuffled",
)  # fmt: skip
STUDENTS = ("opsd", "noise", "sft", "sft_base")
MEASURES = (
    "pre", "noise_vt", "prompts_only", "shuffled_vt", "blank_vt", "problem_vt", "crop_vt",
    "identical",
)  # fmt: skip
CLASSES = ("tag", "answer", "number", "function", "content")
GUIDED, DRAWN = "base, interleaved with guidance", "base, interleaved"
TIMED = (
    GUIDED, DRAWN, "base, text-only", "sft, text-only", "noise, text-only", "opsd, text-only",
)  # fmt: skip
ARMS = ("opsd", "noise")
WATCHED = {  # metric of training -> around which it lies
    "loss": 0.02, "jsd": 0.02, "k_gen": 0.8, "student_entropy": 0.4, "student_mass_outside": 0.003,
    "clipped_share": 0.1, "completion_length": 20.0, "ended_by_budget": 0.2,
    "empty_completions": 0.1, "image_skips": 0.1, "over_cap": 0.1, "skipped_records": 0.1,
    "teacher_drift": 0.005, "lr": 0.001,
}  # fmt: skip
LAYERS, STEPS, TOKENS = 4, (0, 25, 50, 75), 3
PLAN = {
    "title": "invented numbers",
    "command": "bash scripts/reproduce_mini.sh --name invented",
    "config": "data/configs/mini.yaml",
    "seeds": len(SEEDS),
    "steps": STEPS[-1],
    "quick": False,
    "own_questions": True,
    "defaults": {
        "jsd_top_k": "64", "jsd_token_clip": "0", "jsd_beta": "0.1", "teacher_mode": "ema",
        "ema_decay": "0.998",
    },
    "sweeps": {
        "jsd_top_k": ["128", "4", "0"],
        "jsd_token_clip": ["0.1", "0.01", "0.05"],
        "jsd_beta": ["1", "0"],
        "teacher_mode": ["self", "fixed"],
        "ema_decay": ["0.98", "0.9995"],
    },
}  # fmt: skip
SWEPT = ("default", *(f"{knob}-{v}" for knob, values in PLAN["sweeps"].items() for v in values))


def number(*place: object, low: float = 0.0, high: float = 1.0) -> float:
    """A number of this place alone, from low to high."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return low + (high - low) * int.from_bytes(digest[:6], "big") / 2**48


def count(*place: object, low: int, high: int) -> int:
    return int(number(*place, low=low, high=high))


def estimate(*place: object, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    """A value and an interval around it that is not symmetric."""
    value = number(*place, low=low, high=high)
    widths = (number(*place, end, low=0.01, high=0.1) for end in ("below", "above"))
    below, above = widths
    return {"value": value, "low": value - below, "high": value + above}


def record(
    file: str, task: str, id: str, values: Mapping[str, Any], seed: int | None, step: int | None = 0
) -> Record:
    """A record whose origin tells its file and task."""
    commit = hashlib.sha256(f"{file} {task}".encode()).hexdigest()[:40]
    return base_record(
        kind="invented", system="invented", task=task, id=id, values=values, seed=seed, step=step,
        config_hash="0" * 12,
        info={
            "commit": commit,
            "command": f"python -m invented {file}",
            "created": "2026-01-01T00:00:00+00:00",
            "hardware": {"machine": "none", "cpus": 1, "gpus": [], "torch": "0"},
        },
    )  # fmt: skip


# --- the files of a command -----------------------------------------------------------------------


def scores(file: str, tasks: Sequence[str], seed: int) -> list[Record]:
    """As eval.scores writes them, with what the report reads and a little more."""
    records, system = [], Path(file).parent.name
    for task in (*tasks, OVERALL):
        accuracy = estimate(file, task, low=0.2, high=0.8)
        values = {
            "n": count(file, task, "n", low=50, high=900),
            "accuracy": accuracy["value"],
            "low": accuracy["low"],
            "high": accuracy["high"],
            "row_accuracy": number(file, task, "row_accuracy"),
            "mean_tokens": number(file, task, "mean_tokens", low=5, high=500),
            "mean_pictures": number(file, task, "mean_pictures"),
            "seconds_per_sample": number(file, task, "seconds", low=0.1, high=9),
        }
        if task != OVERALL:
            values |= {"rows": count(file, task, "rows", low=50, high=900)}
        records.append(record(file, task, system, values, seed))
    return records


def summary(file: str, students: Sequence[str], seed: int) -> list[Record]:
    """As eval.kl_diagnostic writes it."""
    records = []
    for task in (*TASKS, OVERALL):
        values: Record = {"n": count(file, task, low=50, high=900)}
        names = (*MEASURES, *(f"post:{student}" for student in students))
        values |= {name: estimate(file, task, name, low=0.3, high=3) for name in names}
        values["gap_closed"] = {
            student: estimate(file, task, "closed", student, low=-0.5, high=0.9)
            for student in students
        }
        records.append(record(file, task, "summary", values, seed))
    return records


def tokens(file: str, seed: int) -> list[Record]:
    """As eval.token_classes writes them: of every class, and the tests of where there are both."""
    records = []
    for task in (*TASKS, OVERALL):
        for name in CLASSES:
            values = {
                "tokens": count(file, task, name, low=100, high=9000),
                "mean": number(file, task, name, "mean", low=0.01, high=2),
                "share": number(file, task, name, "share"),
                "measure": "pre",
            }
            records.append(record(file, task, name, values, seed))
    for task in (TASKS[1], OVERALL):
        values = {"n": count(file, task, "n", low=20, high=900), "measure": "pre"}
        values |= estimate(file, task, "test") | {"p": number(file, task, "p", low=0.01)}
        records.append(record(file, task, "content - function", values, seed))
    return records


def pairs(file: str, seed: int) -> list[Record]:
    """As eval.pairs writes them."""
    records = []
    for pair in PAIRS:
        for task in (*TASKS, OVERALL):
            here = (file, pair, task)
            names = ("both", "only_first", "only_second", "neither")
            counts = {name: count(*here, name, low=10, high=300) for name in names}
            values = {
                "n": sum(counts.values()),
                "first": number(*here, "first"),
                "second": number(*here, "second"),
                **counts,
                "difference": estimate(*here, low=-0.5, high=0.5),
                "p": number(*here, "p"),
                "tasks": [task],
            }
            records.append(record(file, task, pair, values, seed))
    return records


def validation(file: str, seed: int) -> list[Record]:
    """As training writes it, one set of records per validation."""
    records = []
    for step in STEPS:
        for task in (*TASKS, OVERALL):
            here = (file, task, step)
            values = {
                "n": count(file, task, low=20, high=90),
                "accuracy": number(*here, "accuracy"),
                "unparsed_rate": number(*here, "unparsed"),
                "budget_rate": number(*here, "budget"),
                "mean_tokens": number(*here, "tokens", low=5, high=50),
                "k_gen": number(*here, "k_gen", low=0.1, high=3),
                **{f"k_gen_of/{name}": number(*here, name, low=0.1, high=3) for name in CLASSES},
                "gap_closed": number(*here, "closed", low=-0.3),
            }
            records.append(record(file, task, "summary", values, seed, step))
    return records


def attention(file: str) -> list[Record]:
    """As eval.attention writes it; layers last to first, since no order is promised."""
    records = []
    for mode in ("drawn", "true", "noise", "shuffled"):
        for text in TEXTS:
            for layer in reversed(range(LAYERS)):
                for task in (*TASKS, OVERALL):
                    here = (file, mode, text, layer, task)
                    totals = {n: estimate(*here, n, low=0.1, high=0.2) for n in TOTALS}
                    values = {name: number(*here, name, high=0.2) for name in SOURCES}
                    values |= {name: total["value"] for name, total in totals.items()}
                    values["uniform"] = {
                        name: number(*here, "uniform", name, high=0.2)
                        for name in (*SOURCES, *TOTALS)
                    }
                    for end in ("low", "high"):
                        values[end] = {name: total[end] for name, total in totals.items()}
                    values |= {"n": count(*here, low=2, high=60), "without": 0}
                    records.append(record(file, task, f"{mode}/{text}/{layer:02}", values, 0))
    return records


def latency(file: str) -> list[Record]:
    """As eval.interleaved writes its table."""
    records = []
    for name in TIMED:
        found = estimate(file, name, "accuracy", low=0.2, high=0.8)
        values = {
            "n": count(file, name, low=4, high=90),
            "accuracy": found["value"],
            "low": found["low"],
            "high": found["high"],
            "tokens": number(file, name, "tokens", low=5, high=50),
            "pictures": number(file, name, "pictures"),
            "picture_width": count(file, name, "width", low=32, high=512),
            "picture_height": count(file, name, "height", low=32, high=512),
            "seconds": number(file, name, "seconds", low=0.01, high=9),
            "ratio": number(file, name, "ratio", low=1, high=30),
            "drawing": asdict(drawing(file, name)) if name in (GUIDED, DRAWN) else None,
        }
        records.append(record(file, OVERALL, name, values, 0))
    return records


def drawing(*place: object) -> Drawing:
    """How a system drew, with nothing at its default."""
    return Drawing(
        num_timesteps=count(*place, "grid", low=5, high=90),
        timestep_shift=number(*place, "shift", low=1, high=5),
        cfg_text_scale=number(*place, "by text", low=1, high=5),
        cfg_img_scale=number(*place, "by image", low=1, high=5),
        cfg_renorm_min=number(*place, "renorm"),
    )


def metrics(file: str) -> list[Record]:
    """Lines as train.metrics writes them: what was logged, and after it what was validated.

    The sentinel's light is yellow once while seed 0 trains, and red in a validation of seed 1.
    """
    seed = int(file[4])
    lines: list[Record] = [
        {"step": 0, "val/k_gen": number(file, "start"), "val/sentinel": 0.0},
    ]
    for step in STEPS[1:]:
        watched = {
            name: number(file, name, step, low=size / 2, high=size)
            for name, size in WATCHED.items()
        }
        light = float(seed == 0 and step == STEPS[1])
        lines.append({"step": step, **watched, "sentinel": light})
        light = 2.0 * (seed == 1 and step == STEPS[2])
        lines.append({"step": step, "val/k_gen": number(file, step), "val/sentinel": light})
    return lines


def theorem(file: str) -> list[Record]:
    """As eval.theorem writes it."""
    names = ["means", "broken", "broken, mean"]
    names += [f"{name}, to {end}" for name in BETAS for end in ("p*", "the mean")]
    return [
        record(
            file, f"noise {noise}", f"noise {noise}",
            {name: number(file, noise, name) for name in names} | {"draws": 20}, 0, None,
        )
        for noise in NOISES
    ]  # fmt: skip


def cases(file: str) -> list[Record]:
    """As eval.cases writes them: one of either kind, of two tasks."""
    records = []
    for place, (task, kind) in enumerate(
        zip(TASKS[:2], ("only_first", "only_second"), strict=True)
    ):
        stem = f"pictures/{task}-{kind}-1"
        answers = [
            {
                "system": name,
                "text": f"text of {name} on {task}",
                "answer": "a",
                "correct": (kind == "only_first") == first,
                "finish": "stop",
                "tokens": count(file, task, name, low=5, high=50),
                "prompt": "prompt",
                "seed": 0,
                "pictures": [f"{stem}-{name}-1.png"] if first else [],
                "redraw_error": "wrote something else" if not first and place else "",
            }
            for name, first in (("thinkmorph", True), ("opsd", False))
        ]
        values = {
            "case": kind,
            "place": 1,
            "total": count(file, task, "total", low=2, high=99),
            "rule": "the first of each kind",
            "question": f"question of {task}",
            "gold": f"gold of {task}",
            "options": {},
            "problem": [f"{stem}-problem-1.png"],
            "visual_thoughts": [f"{stem}-true-1.png"],
            "answers": answers,
            "commands": ["python -m eval.run"],
        }
        records.append(record(file, task, f"row-{place}", values, 0))
    return records


def microscope(file: str) -> list[Record]:
    """As eval.microscope writes it: two samples of every task."""
    records = []
    for task in TASKS:
        for sample in range(2):
            shown = [
                {
                    "text": f"word{sample}{token} ",
                    "id": token,
                    "kl": number(file, task, sample, token, high=3),
                    "jsd": number(file, task, sample, token, "jsd"),
                    "clipped": 0,
                    "entries": 64,
                    "class": CLASSES[token],
                }
                for token in range(TOKENS)
            ]
            values = {"student": "opsd", "question": "q", "gold": "g", "tokens": shown}
            values["mean_kl"] = number(file, task, sample, "mean")
            records.append(record(file, task, f"{task}/row-{sample}", values, 0))
    return records


# --- the folder -----------------------------------------------------------------------------------


def _of_seed(seed: int) -> Files:
    at, files = f"seed{seed}", {}
    for folder, systems in (("systems", SYSTEMS), ("controls", CONTROLS)):
        for system in systems:
            file = f"{at}/{folder}/{system}/scores.json"
            files[file] = scores(file, TASKS, seed)
    for folder in ("kl", "kl_own"):
        file = f"{at}/{folder}/summary.json"
        files[file] = summary(file, STUDENTS, seed)
    for arm in ARMS:
        file = f"{at}/{arm}/validation.jsonl"
        files[file] = validation(file, seed)
    files[f"{at}/kl/tokens.json"] = tokens(f"{at}/kl/tokens.json", seed)
    files[f"{at}/pairs.json"] = pairs(f"{at}/pairs.json", seed)
    return files


def invented_files() -> Files:
    """Every file of records -> its records."""
    files: Files = {}
    for seed in SEEDS:
        files |= _of_seed(seed)
    for run in SWEPT:
        file = f"sweep/systems/{run}/scores.json"
        files[file] = scores(file, TASKS, 0)
    files["sweep/kl/summary.json"] = summary("sweep/kl/summary.json", SWEPT, 0)
    makers = {
        "attention/attention.json": attention,
        "latency/table.json": latency,
        "theorem/theorem.json": theorem,
        "cases/cases.json": cases,
        "microscope/microscope.json": microscope,
    }
    return files | {file: make(file) for file, make in makers.items()}


def invented_metrics() -> Files:
    """Every file of metrics -> its lines, which are no records."""
    files = (f"seed{seed}/{arm}/metrics.jsonl" for seed in SEEDS for arm in ARMS)
    return {file: metrics(file) for file in files}


def pictures_of(files: Files) -> list[str]:
    """The pictures that the cases name, from the folder of results."""
    found = []
    for case in files["cases/cases.json"]:
        values = case["values"]
        drawn = [file for answer in values["answers"] for file in answer["pictures"]]
        found += [*values["problem"], *drawn, *values["visual_thoughts"]]
    return [f"cases/{file}" for file in found]


def write_file(folder: Path, file: str, records: Sequence[Record]) -> None:
    """Without the care of train.records for crashes: that would take a second for each report."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")


def write_results(folder: Path, files: Files) -> None:
    """The folder as eval.reproduce leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    for file, records in (files | invented_metrics()).items():
        write_file(folder, file, records)
    for place, file in enumerate(pictures_of(files)):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (30 * place, 255 - 30 * place, 128)).save(buffer, "PNG")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(buffer.getvalue())
    (folder / "microscope" / "microscope.html").write_text("<p>tokens</p>", encoding="utf-8")


# --- what is expected of a report of it, in plain Python, and the report under test ---------------

FILES = invented_files()


METRICS = invented_metrics()


PICTURES = pictures_of(FILES)


COLUMN_TASKS = (*TASKS, OVERALL)


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


def by_seed(system: str, task: str = OVERALL, folder: str = "systems") -> Want:
    return over_seeds(lambda seed: accuracy(f"seed{seed}/{folder}/{system}/scores.json", task))


def shown(task: str) -> str:
    return task.replace("_", " ")


TITLES = ("Visual Search", "Spatial Navigation", "Jigsaw Assembly", "Chart Refocus", "mean")


def kl(measure: str, task: str, form: str = "{:.3f}", folder: str = "kl") -> Want:
    return over_seeds(lambda s: raw(f"seed{s}/{folder}/summary.json", measure, task=task), form)


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


def minus(system: str, other: str, task: str = OVERALL) -> Want:
    pairs = [
        [accuracy(f"seed{seed}/systems/{name}/scores.json", task) for name in (system, other)]
        for seed in SEEDS
    ]
    points = [a.value - b.value for a, b in pairs]
    text = f"{fmean(points):+.1f} ± {stdev(points):.1f}"
    return Want(text, fmean(points), frozenset(value.source for pair in pairs for value in pair))


SETTINGS = (  # knob, its value, the name of its run
    ("jsd_top_k", "4", "jsd_top_k-4"),
    ("jsd_top_k", "64", "default"),
    ("jsd_top_k", "128", "jsd_top_k-128"),
    ("jsd_top_k", "0", "jsd_top_k-0"),
    ("jsd_token_clip", "0.01", "jsd_token_clip-0.01"),
    ("jsd_token_clip", "0.05", "jsd_token_clip-0.05"),
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


PILOT = {
    "draws its VTs": ("systems", "thinkmorph"),
    "shown noise in their place": ("systems", "thinkmorph-noise"),
    "shown another problem's": ("controls", "thinkmorph-shuffled"),
    "asks, and is shown nothing": ("systems", "thinkmorph-none"),
    "text-only": ("systems", "base"),
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


def chosen_step(file: str) -> int:
    """By the rule of training: best accuracy, then smallest gap; the start is no checkpoint."""
    scored = [
        (raw(file, "accuracy", step=step).value, -raw(file, "k_gen", step=step).value, -step)
        for step in STEPS[1:]
    ]
    return -max(scored)[2]


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


def made(place: Path) -> Path:
    """The invented folder of results; tests that change it put it back."""
    write_results(place, FILES)
    return place


def collected(folder: Path) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    drawn = Drawn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "figures", drawn)
        return collect(folder)[0], drawn.calls


def runs_of(folder: Path) -> Runs:
    return Runs(Results(folder), RunPlan.read(folder))


@contextmanager
def written_for_a_while(folder: Path, files: Files) -> Iterator[None]:
    """Other records or lines in these files; then what they had."""
    try:
        for file, records in files.items():
            write_file(folder, file, records)
        yield
    finally:
        for file in files:
            write_file(folder, file, (FILES | METRICS)[file])


def tables_of(artefacts: Iterable[Artefact]) -> dict[str, Table]:
    return {b.name: b for a in artefacts for b in a.blocks if isinstance(b, Table)}


def same(cell: Cell, want: str | Want) -> None:
    if isinstance(want, str):
        assert cell == want
        return
    assert isinstance(cell, Number), f"{cell!r} is no number, expected {want.text}"
    found = (cell.text, cell.kind, frozenset(cell.sources))
    assert found == (want.text, want.kind, want.sources), f"{found} instead of {want}"
    assert cell.value == pytest.approx(want.value, rel=1e-12, abs=0), f"{cell} instead of {want}"


def planned(folder: Path, **fields: Any) -> Runs:
    """Over the same results, with another plan."""
    return Runs(Results(folder), replace(RunPlan.read(folder), **fields))


def drawn_figure(picture: Picture | None) -> Figure:
    assert picture is not None and isinstance(picture.image, Figure)
    return picture.image


def told(want: Want, text: str) -> Want:
    return Want(text, want.value, want.sources)


def is_missing(cell: Cell | None) -> bool:
    return cell is None or (
        isinstance(cell, Number)
        and (cell.text, cell.value, cell.kind) == ("not run", None, "missing")
    )


def beside(artefact: Artefact) -> dict[str, Picture | Text]:
    """Its pictures and texts by name."""
    return {
        b.name if isinstance(b, Picture) else b.title: b
        for b in artefact.blocks
        if not isinstance(b, Table)
    }


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
