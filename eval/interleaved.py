"""Thinking in pictures against text alone: accuracy, tokens, pictures and seconds, in one table.

    python -m eval.interleaved --model_path BASE --student_path STUDENT --output_dir DIR

The base answers interleaved, with and without guidance, and in text alone; every student in text
alone, the last of them being what the others are compared with. Accuracy is measured in batches.
Seconds are those of single samples: every system takes the same samples in turn, preprocessing
included and file reading not, `--repeats` times after a warm-up; the table has the median over
samples of each sample's median, and the median of the paired ratios.

Writes table.md and table.json (a record per system), scores.json (accuracy per task and system) and
seconds.json (a record per sample).
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

from data.parquet import SPLITS
from eval.asking import ask
from eval.backends.bagel import BagelSystem
from eval.benchmarks import first_samples
from eval.kl_diagnostic import student_paths
from eval.protocol import Decoding, Protocol
from eval.sample import Reply, Sample
from eval.scoring import score
from eval.session import (
    add_drawing_flags,
    announce,
    drawing_of,
    markdown_table,
    open_sources,
    origin,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
)
from eval.statistics import OVERALL, wilson_interval
from inferencer import InterleaveInferencer
from train.config import DTYPES
from train.records import base_record, run_info, write_atomic, write_records
from train.session import exit_on_user_error

GUIDED, DRAWN, BASE = (
    "base, interleaved with guidance",
    "base, interleaved",
    "base, text-only",
)
Answer = Callable[[Sequence[Sample]], list[Reply]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one sample under every system, a number per repeat."""

    sample: Sample
    seconds: dict[str, list[float]]


def open_systems(args: argparse.Namespace, device: torch.device) -> dict[str, Answer]:
    """Name -> what answers a batch, the slowest first."""
    dtype = pick_dtype(args.compute_dtype, device)

    def opened(path: str, weights: str, draws: bool = False) -> InterleaveInferencer:
        inferencer = InterleaveInferencer.from_pretrained(path, device, dtype, weights, draws)
        announce(path, weights, inferencer.model)
        return inferencer

    def answer(
        name: str, inferencer: InterleaveInferencer, context: str, guided: bool = False
    ) -> Answer:
        protocol = Protocol(name, Decoding(args.max_new_tokens), drawing=drawing_of(args, guided))
        system = BagelSystem(name, inferencer, protocol, context)
        return lambda samples: ask(system, samples, 0, args.seed)

    drawing = opened(args.model_path, args.weights, draws=True)
    text = opened(args.model_path, args.weights)
    systems = {}
    if args.cfg_text_scale > 1:
        systems[GUIDED] = answer(GUIDED, drawing, "interleaved", guided=True)
    systems[DRAWN] = answer(DRAWN, drawing, "interleaved")
    systems[BASE] = answer(BASE, text, "student")
    for student, path in students_of(args.student_path).items():
        name = f"{student}, text-only"
        systems[name] = answer(name, opened(path, "auto"), "student")
    return systems


def students_of(values: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR` -> name: folder; one without a name is "student"."""
    named = (v if "=" in v and not Path(v).is_dir() else f"student={v}" for v in values)
    return student_paths(list(named))


def read_samples(args: argparse.Namespace) -> list[list[Sample]]:
    """The first rows of every source."""
    names = open_sources(args.dataset_config_file).dataset_names
    return [first_samples(n, args.data_root, args.split, args.limit_per_task) for n in names]


def accuracies(
    systems: dict[str, Answer], tasks: list[list[Sample]], batch_size: int
) -> dict[str, dict[str, dict[str, float | int]]]:
    """System -> task (and overall) -> scores."""
    scores = {}
    total = sum(map(len, tasks))
    for name, answer in systems.items():
        by_task = {}
        with tqdm(total=total, desc=name, unit="sample", dynamic_ncols=True) as bar:
            for samples in tasks:
                replies: list[Reply] = []
                for start in range(0, len(samples), batch_size):
                    replies += answer(samples[start : start + batch_size])
                    bar.update(min(batch_size, len(samples) - start))
                by_task[samples[0].benchmark] = task_scores(samples, replies)
        scores[name] = {**by_task, OVERALL: overall(list(by_task.values()))}
    return scores


def task_scores(samples: Sequence[Sample], replies: Sequence[Reply]) -> dict[str, float | int]:
    """What is reported of one task."""
    pairs = list(zip(samples, replies, strict=True))
    accuracy = fmean(score(reply.text, sample.question).correct for sample, reply in pairs)
    low, high = wilson_interval(accuracy, len(pairs))
    return {
        "n": len(pairs),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "mean_tokens": fmean(reply.tokens for reply in replies),
        "mean_pictures": fmean(len(reply.pictures) for reply in replies),
        "picture_width": max(_sides(replies, 0), default=0),
        "picture_height": max(_sides(replies, 1), default=0),
        "seconds_per_sample": fmean(reply.seconds for reply in replies),
    }


def _sides(replies: Sequence[Reply], axis: int) -> list[int]:
    """Widths (axis 0) or heights of all drawn pictures, in pixels."""
    return [picture.size[axis] for reply in replies for picture in reply.pictures]


def overall(tasks: Sequence[dict[str, float | int]]) -> dict[str, float | int]:
    """Means over tasks, each task counting the same."""
    values = {name: fmean(task[name] for task in tasks) for name in tasks[0]}
    values["n"] = sum(task["n"] for task in tasks)
    values["low"], values["high"] = wilson_interval(values["accuracy"], values["n"])
    return values


def timings(systems: dict[str, Answer], samples: list[Sample], repeats: int) -> list[Timing]:
    """Each sample under every system in turn: what else the machine does meets all alike."""
    for answer in systems.values():
        answer(samples[:1])  # warm-up
    found = [Timing(sample, {name: [] for name in systems}) for sample in samples]
    rounds = [(timing, name) for _ in range(repeats) for timing in found for name in systems]
    for timing, name in tqdm(rounds, desc="seconds", unit="answer", dynamic_ncols=True):
        (reply,) = systems[name]([timing.sample])
        timing.seconds[name].append(reply.seconds)
    return found


def table_rows(
    scores: dict[str, dict[str, dict[str, float | int]]], times: list[Timing]
) -> dict[str, dict[str, Any]]:
    """What the table says of each system."""
    reference = list(scores)[-1]
    rows = {}
    for name, by_task in scores.items():
        of = {i: median(t.seconds[name]) for i, t in enumerate(times)}
        base = {i: median(t.seconds[reference]) for i, t in enumerate(times)}
        overall = by_task[OVERALL]
        rows[name] = {
            "n": overall["n"],
            "accuracy": overall["accuracy"],
            "low": overall["low"],
            "high": overall["high"],
            "tokens": overall["mean_tokens"],
            "pictures": overall["mean_pictures"],
            "picture_width": overall["picture_width"],
            "picture_height": overall["picture_height"],
            "seconds": median(of.values()),
            "ratio": median(of[i] / base[i] for i in of),
        }
    return rows


def columns(rows: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """Header and cells of the table, for `markdown_table`."""
    last = list(rows)[-1]
    header = ["system", "accuracy, %", "tokens", "pictures", "seconds", f"times {last}"]
    return header, {
        name: [
            f"{100 * row['accuracy']:.1f} ({100 * row['low']:.0f} .. {100 * row['high']:.0f})",
            f"{row['tokens']:.1f}",
            f"{row['pictures']:.2f}",
            f"{row['seconds']:.4f}",
            f"{row['ratio']:.1f}",
        ]
        for name, row in rows.items()
    }


def markdown(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The table and what it was measured with."""
    info, first = run_info(), next(iter(rows.values()))
    lines = markdown_table(*columns(rows))
    lines += [
        "",
        f"{first['n']} {args.split} items; 95 % intervals; accuracy is the mean over tasks. "
        f"{args.num_timesteps} grid points, shift {args.timestep_shift}; guidance by text "
        f"{args.cfg_text_scale} and images {args.cfg_img_scale} in the interval "
        f"{args.cfg_interval[0]} .. {args.cfg_interval[1]}. Seconds: median over "
        f"{args.latency_samples} items per task, single samples, {args.repeats} paired runs.",
        "",
        f"Command: `{info['command']}`, seed {args.seed}, commit {info['commit']}, "
        f"{info['hardware']['cpus']} CPU cores, GPUs: {len(info['hardware']['gpus'])}.",
    ]
    return "\n".join(lines) + "\n"


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure, write the three files, print the table."""
    positive(
        limit_per_task=args.limit_per_task,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        latency_samples=args.latency_samples,
        repeats=args.repeats,
    )
    tasks = read_samples(args)
    systems = open_systems(args, pick_device(args.device))
    scores = accuracies(systems, tasks, args.batch_size)
    timed = [sample for samples in tasks for sample in samples[: args.latency_samples]]
    times = timings(systems, timed, args.repeats)
    rows = table_rows(scores, times)
    for name, row in rows.items():
        drawn = drawing_of(args, name == GUIDED)
        row["drawing"] = dataclasses.asdict(drawn) if name in (GUIDED, DRAWN) else None
    folder = Path(args.output_dir)
    common: dict[str, Any] = origin("interleaved", args)
    write_records(
        folder / "scores.json",
        [
            base_record(task=task, id=name, values=values, **common)
            for name, by_task in scores.items()
            for task, values in by_task.items()
        ],
    )
    write_records(
        folder / "table.json",
        [base_record(task=OVERALL, id=name, values=row, **common) for name, row in rows.items()],
    )
    write_records(
        folder / "seconds.json",
        [
            base_record(
                task=timing.sample.benchmark, id=timing.sample.id, values=timing.seconds, **common
            )
            for timing in times
        ],
    )
    text = markdown(rows, args)
    write_atomic(folder / "table.md", text)
    print(text)
    print(f"saved {folder}/table.md, table.json, scores.json and seconds.json")
    return rows


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("eval.interleaved", "Thinking in pictures against text alone.")
    add = parser.add_argument
    add("--student_path", nargs="+", default=[], metavar="NAME=DIR", help="trained checkpoints")
    add("--split", choices=SPLITS, default="test")
    add("--limit_per_task", type=int, default=200, help="first rows of each source")
    add("--max_new_tokens", type=int, default=1024, help="of each text")
    add("--batch_size", type=int, default=1, help="rows together, for accuracy")
    add("--latency_samples", type=int, default=5, help="rows of each source that are timed")
    add("--repeats", type=int, default=3, help="times each of them is answered")
    add("--seed", type=int, default=0, help="of the noise that drawings start from")
    add("--compute_dtype", choices=("auto", *DTYPES), default="auto", help="as in eval.run")
    add_drawing_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        compare(args)


if __name__ == "__main__":
    main()
