"""What a run takes before it is started: peak memory of each stage (`train.memory`), seconds of a
step (`train.timing`), and which knob to turn where it does not fit.

    python -m train.plan --model_path ThinkMorph-7B --gpus 8x80
    python -m train.plan --model_path models/mini-base --gpus cpu

Needs no GPU, no weights and no data; every number is predicted. GB are 10^9 bytes.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from modeling.attention import Backend
from modeling.config import BagelConfig, ConfigError
from train import cost
from train.config import DTYPES, UsageError
from train.cost import Case, Machine
from train.knobs import FULL_IMAGE, gpus_needed, knobs, largest_image, remedy, turned
from train.memory import Mode, Setup, fits, host_memory, memory, peak, static_memory, total
from train.optim import Moments
from train.records import write_atomic
from train.session import exit_on_user_error
from train.teacher import TeacherMode
from train.timing import calibrate, scaling, stages, step_seconds

GB = 1e9
BY_SIZE = {141: "H200", 80: "H800", 48: "L40S-48", 40: "A100-40"}

Figures = dict[str, Any]


# ---- what is said -------------------------------------------------------------------------------


def figures(s: Setup, with_scaling: bool) -> Figures:
    """All of them, as json has them."""
    where, most = peak(s)
    timed = {name: dataclasses.asdict(t) | {"seconds": t.seconds} for name, t in stages(s).items()}
    found: Figures = {
        "predicted": True,
        "machine": dataclasses.asdict(s.machine),
        "gpus": s.world,
        "strategy": s.strategy,
        "mesh": [s.replicas, s.shard],
        "trained_parameters": s.trained,
        "rows_per_rank": s.rows,
        "memory": memory(s),
        "peak": {"stage": where, "bytes": most},
        "host_bytes_per_rank": host_memory(s),
        "fits": fits(s),
        "seconds": timed,
        "step_seconds": step_seconds(s),
    }
    if not found["fits"]:
        found["knobs"] = {flag: peak(turned(s, [flag]))[1] for flag in knobs(s)}
        found["turn"] = remedy(s)
        if found["turn"] is None:
            found["gpus_needed"] = gpus_needed(s)
    if with_scaling:
        found["scaling"] = list(scaling(s))
    return found


def text(s: Setup, found: Figures) -> Iterator[str]:
    """The report for a terminal."""
    most, where = found["peak"]["bytes"], found["peak"]["stage"]
    unit, size = ("GB", GB) if most >= GB else ("MB", 1e6)
    mesh = f"mesh {s.replicas} x {s.shard}" if s.strategy == "fsdp" else s.strategy
    yield (
        f"{s.world} x {s.machine.name} ({s.machine.memory / GB:.0f} GB), {mesh}, mode {s.mode}: "
        f"{s.trained / 1e6:,.1f} M parameters,\n{s.rows} rows per rank in micro batches of "
        f"{s.micro_rows}. All numbers are predicted, none is measured here.\n"
    )
    kept, rows = static_memory(s), []
    for name, items in found["memory"].items():
        stays = sum(v for k, v in items.items() if k in kept)
        values = stays, total(items) - stays, total(items)
        rows.append([name, *(f"{v / size:.1f}" for v in values)])
    yield table([f"memory per rank, {unit}", "stays", "on top", "together"], rows)
    yield f"\nThe peak is in {where}:"
    for name, value in found["memory"][where].items():
        yield f"  {value / size:8.1f}  {name}"
    if found["host_bytes_per_rank"]:
        yield f"  {found['host_bytes_per_rank'] / size:8.1f}  in host memory (moments)"
    yield from ("", *advice(s, found, unit, size), "")
    rows = [
        [name, f"{t['floor']:.4g}", f"{t['share']:.2f}", t["origin"], f"{t['seconds']:.4g}"]
        for name, t in found["seconds"].items()
    ]
    rows.append(["step", "", "", "", f"{found['step_seconds']:.4g}"])
    yield table(["seconds per step", "floor", "reached", "which is", "expected"], rows)
    if "scaling" in found:
        yield from ("", *scaling_lines(s, found["scaling"]))


def advice(s: Setup, found: Figures, unit: str, size: float) -> Iterator[str]:
    """Whether it fits, and what helps."""
    most, capacity = found["peak"]["bytes"], s.machine.memory
    filled = f"{most / size:.1f} of {capacity / size:.1f} {unit}"
    if found["fits"]:
        yield f"FITS: {filled}, {(capacity - most) / size:.1f} left"
        largest = largest_image(s)
        if largest >= FULL_IMAGE:
            yield f"Images of any size fit ({FULL_IMAGE:,} tokens at most)"
        else:
            yield f"Images of up to {largest:,} tokens fit ({s.case.image:,} were counted)"
        return
    yield f"DOES NOT FIT: {filled}. Each knob alone:"
    for flag, value in found["knobs"].items():
        enough = "  fits" if value <= capacity else ""
        yield f"  {flag:<33} {value / size:8.1f} {unit}{enough}"
    if found["turn"]:
        there = turned(s, found["turn"])
        yield f"TURN {' '.join(found['turn'])}:"
        yield (
            f"  {peak(there)[1] / size:.1f} {unit}, {step_seconds(there):.4g} instead of "
            f"{found['step_seconds']:.4g} s per step"
        )
    elif found["gpus_needed"]:
        needed, flags = found["gpus_needed"]
        knob = f"\n  with {' '.join(flags)}" if flags else ""
        yield f"No knob is enough: {needed} such GPUs that share the weights hold it{knob}"
    else:
        yield "No knob is enough: use larger GPUs, or smaller images and fewer tokens"


def scaling_lines(s: Setup, rows: Sequence[Figures]) -> Iterator[str]:
    """The table of more GPUs and how to read it."""
    cells = []
    for row in rows:
        raised = "*" if row["global_batch"] != s.global_batch else ""
        over = "!" if row["memory"] > s.machine.memory else ""
        replicas, shard = row["mesh"]
        first = [f"{row['gpus']}", f"{replicas}x{shard}", f"{row['global_batch']}{raised}"]
        sizes = [f"{row['memory'] / GB:.1f}{over}", f"{row['received'] / GB:.1f}"]
        names = ("decode", "compute", "wire", "step", "longest")
        seconds = [f"{row[name]:.2f}" for name in names]
        cells.append([*first, *sizes, *seconds, f"{row['rate']:.3f}"])
    yield table(
        ["GPUs", "mesh", "batch", "peak GB", "GB wired", "decode s", "compute s", "wire s"]
        + ["step s", "longest", "samples/s/GPU"],
        cells,
    )
    yield (
        f"* --global_batch {s.global_batch} has no row for every rank there, and the trainer "
        "refuses that many. The line\n  is of a larger batch, one row each: another run."
    )
    yield (
        "! does not fit with these knobs.\nlongest: the longest completion over the mean. Decoding "
        "reads all weights for each of its tokens,\n  however few rows a rank has: more GPUs do "
        "not shorten that."
    )
    bound = next((row["gpus"] for row in rows if row["wire"] > row["compute"]), None)
    said = f"busier than the GPUs from {bound} on" if bound else "never as busy as the GPUs"
    yield (
        f"wire: {s.machine.link / GB:.0f} GB/s within nodes of eight, {s.inter_node / GB:.0f} GB/s "
        f"per GPU between them, without latency;\n  {said}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for first, *others in lines:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        shown.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(shown)


# ---- command line -------------------------------------------------------------------------------


def parse_gpus(given: str) -> tuple[int, Machine]:
    """`8x80`, `1xH200`, `cpu` -> how many of which machine.

    Raises:
        UsageError: anything else, with the choices.
    """
    count, _, kind = given.rpartition("x") if "x" in given else ("1", "", given)
    by_name = {name.lower(): machine for name, machine in cost.MACHINES.items()}
    by_name |= {str(size): cost.MACHINES[name] for size, name in BY_SIZE.items()}
    if count.isdecimal() and int(count) > 0:
        if kind == "cpu":
            return int(count), calibrate()
        if kind.lower() in by_name:
            return int(count), by_name[kind.lower()]
    kinds = ", ".join(f"Nx{kind}" for kind in (*BY_SIZE, *cost.MACHINES))
    raise UsageError(
        f"--gpus {given} is not a number of GPUs and their size in GB or name: write {kinds} or cpu"
    )


def open_config(path: str) -> BagelConfig:
    """Of a folder with the json files, or of a model of the released size, by name.

    Raises:
        UsageError: neither.
    """
    if Path(path).is_dir():
        try:
            return BagelConfig.from_pretrained(path)
        except (ConfigError, ValueError) as error:
            raise UsageError(f"--model_path {path}: {error}") from error
    if Path(path).name in cost.KNOWN_CONFIGS:
        return cost.KNOWN_CONFIGS[Path(path).name]
    raise UsageError(
        f"--model_path {path} is neither a folder with llm_config.json and vit_config.json nor one "
        f"of {', '.join(cost.KNOWN_CONFIGS)}, which need no files"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.plan", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_path", default="ThinkMorph-7B", help="folder with the json files, or a known name")
    add("--gpus", default="1x141", help="how many of what: 8x80, 1xH200, 4xA100-40, cpu")
    add("--mode", default="full", choices=get_args(Mode), help="full = OPSD; sft; drawing; answers")
    add("--compute_dtype", choices=tuple(DTYPES), help="default: float32 on the CPU")
    add("--global_batch", type=int, default=16, help="rows per step over all ranks")
    add("--micro_batch", type=int, default=1, help="rows per forward")
    add("--num_shard", type=int, default=0, help="ranks that share the weights; 0 = a node's")
    add("--activation_checkpointing", type=_truth, default=False, help="True or False")
    add("--attention_backend", default="auto", choices=get_args(Backend))
    add("--adam_moments", default="resident", choices=get_args(Moments))
    add("--teacher_mode", default="ema", choices=get_args(TeacherMode))
    add("--max_forward_tokens", type=int, default=10240, help="cap of the teacher's sequence")
    add("--sample_max_new_tokens", type=int, default=1024, help="completion that has to fit")
    add("--image_tokens", type=int, default=2500, help="patches of the problem's image")
    add("--text_tokens", type=int, default=200, help="system prompt and question")
    add("--vt_tokens", type=int, default=2500, help="patches of a visual thought")
    add("--vts", type=int, default=1, help="visual thoughts of a row")
    add("--completion_tokens", type=int, default=400, help="usual completion")
    add("--inter_node_gbs", type=float, default=50.0, help="GB/s between nodes, per GPU")
    add("--scaling", action="store_true", help="also a table of 1 to 512 GPUs")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    return parser


def _truth(given: str) -> bool:
    if given.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{given!r} is not True or False")
    return given.lower() == "true"


def build_setup(args: argparse.Namespace) -> Setup:
    """Raises UsageError for values that make no sense."""
    counts = "global_batch micro_batch sample_max_new_tokens completion_tokens max_forward_tokens"
    for name, value in vars(args).items():
        least = int(name in counts.split())
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{name} must be at least {least}, got {value}")
    if args.inter_node_gbs <= 0:
        raise UsageError(f"--inter_node_gbs must be above 0, got {args.inter_node_gbs}")
    if args.completion_tokens > args.sample_max_new_tokens:
        raise UsageError(
            f"--completion_tokens {args.completion_tokens} is above --sample_max_new_tokens "
            f"{args.sample_max_new_tokens}, which ends completions: raise that one"
        )
    if args.scaling and args.mode == "inference":
        raise UsageError("--scaling is of training: leave it out for --mode inference")
    config = open_config(args.model_path)
    world, machine = parse_gpus(args.gpus)
    dtype = args.compute_dtype or ("float32" if machine.name == "cpu" else "bfloat16")
    same = "mode num_shard global_batch micro_batch activation_checkpointing attention_backend"
    same += " adam_moments teacher_mode max_forward_tokens"
    return Setup(
        config=config,
        machine=machine,
        world=world,
        itemsize=DTYPES[dtype].itemsize,
        case=Case(
            image=args.image_tokens,
            text=args.text_tokens,
            vt=args.vt_tokens,
            vts=args.vts,
            completion=args.completion_tokens,
        ),
        max_new=args.sample_max_new_tokens,
        inter_node=args.inter_node_gbs * GB,
        **{name: getattr(args, name) for name in same.split()},
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with exit_on_user_error():
        setup = build_setup(args)
        found = figures(setup, args.scaling)
        print("\n".join(text(setup, found)))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.json, json.dumps(found, indent=1) + "\n")
            print(f"saved {args.json}")


if __name__ == "__main__":
    main()
