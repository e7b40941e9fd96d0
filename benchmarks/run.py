"""Run the benchmark suite, show it as a table, write it down.

    python -m benchmarks.run --suite cpu [--only C1,C5] [--repeats 5] [--output FILE.json]
    python -m benchmarks.run --suite gpu [--only decode,loss]       one GPU, the 7B at full size
    python -m benchmarks.run --suite gpu --device cpu --scale tiny    the same code, small, anywhere

Each part of the GPU suite takes less than nine minutes. What has been measured is written after
each gate, so a run that is cut off leaves the rest. The exit status is 1 where two implementations
that are compared do not agree, or where a gate misses what it must reach (the bounds mean nothing
at --scale tiny, and are left out).
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu, full_size, gpu, measure
from benchmarks.gates import Gate, Settings

Suite = dict[str, Callable[..., list[Gate]]]
# Name -> gates by id, or by parts that share their models.
SUITES: dict[str, Suite] = {"cpu": cpu.GATES, "gpu": gpu.PARTS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("gate", "what", "value", "spread", "must", "stretch", "% of floor", "")


def run(suite: Suite, only: Sequence[str], settings: Settings) -> Iterator[list[Gate]]:
    """Gates of each function of the suite, or of those of the given ids; progress on stderr."""
    for gate_id in only or suite:
        start = time.perf_counter()
        print(f"{gate_id} {suite[gate_id].__doc__.splitlines()[0]}", end=" ", file=sys.stderr)
        sys.stderr.flush()
        yield suite[gate_id](settings)
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


def cells(gate: Gate) -> tuple[str, ...]:
    """One row of the table."""
    sign = ">=" if gate.at_least else "<="
    mark = "stretch" if gate.stretches else "pass" if gate.passes else "MISS"
    if gate.must is None:
        mark = "agrees" if gate.checks else ""
    if not gate.agrees:
        wrong = [c for c in gate.checks if not c.holds]
        mark = "WRONG: " + ", ".join(f"{c.what} {c.difference:.3g}" for c in wrong)
    floor = "-" if gate.floor_percent is None else f"{gate.floor_percent:.0f} %"
    value = f"{gate.value:.4g} {gate.unit}".strip()
    return (
        gate.id,
        gate.what,
        value,
        gate.spread,
        "-" if gate.must is None else f"{sign} {gate.must:.3g}",
        "-" if gate.must is None else f"{sign} {gate.stretch:.3g}",
        floor,
        mark,
    )


def table(gates: Sequence[Gate]) -> str:
    """Aligned columns for a terminal."""
    rows = [COLUMNS, *map(cells, gates)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def markdown(gates: Sequence[Gate], provenance: dict[str, Any]) -> str:
    """The table and where it comes from, for a README."""
    hardware = provenance["hardware"]
    place = ", ".join(str(hardware[key]) for key in ("gpu", "cpu") if key in hardware)
    lines = [
        f"Command `{provenance['command']}`, commit `{provenance['commit'][:12]}"
        f"{'-dirty' if provenance['commit'].endswith('-dirty') else ''}`, "
        f"{provenance['created'][:10]}, torch {provenance['torch']}, {place}, "
        f"{hardware['threads']} thread{'s' * (hardware['threads'] > 1)}.",
        "",
        _row(COLUMNS[:-1] + ("result",)),
        _row(["---"] * len(COLUMNS)),
        *(_row(cells(gate)) for gate in gates),
    ]
    return "\n".join(lines) + "\n"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", r"\|") for value in values) + " |"


def record(gate: Gate) -> dict[str, Any]:
    """One gate as json."""
    return {
        **asdict(gate),
        "passes": gate.passes,
        "stretches": gate.stretches,
        "agrees": gate.agrees,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", default="", help="ids of gates, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs of each comparison")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU; default: its own")
    parser.add_argument("--output", type=Path, help="write records as json")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="write the table as Markdown; where the file has <!-- SUITE --> and <!-- /SUITE -->, "
        "between these",
    )
    group = parser.add_argument_group("suite gpu")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    group.add_argument("--scale", choices=sorted(full_size.SCALES), default="full")
    group.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    arguments = parser.parse_args(argv)
    suite = {name.lower(): name for name in SUITES[arguments.suite]}
    asked = [name for name in arguments.only.lower().split(",") if name]
    unknown = [name for name in asked if name not in suite]
    if unknown:
        parser.error(
            f"--only {','.join(unknown)}: suite {arguments.suite} has {', '.join(suite.values())}"
        )
    arguments.only = [suite[name] for name in asked]
    if arguments.repeats < 1 or (arguments.threads or 1) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if arguments.suite == "gpu" and arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda, but torch sees no GPU: --device cpu --scale tiny runs anywhere"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if a gate misses."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = {"suite": arguments.suite, **measure.provenance(argv)}
    settings, bounded = Settings(arguments.repeats), True
    if arguments.suite == "gpu":
        device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        settings = full_size.Settings(arguments.repeats, arguments.scale, device, dtype)
        found["scale"], bounded = arguments.scale, arguments.scale == "full"
    gates: list[Gate] = []
    for some in run(SUITES[arguments.suite], arguments.only, settings):
        gates += some if bounded else [dataclasses.replace(g, must=None) for g in some]
        records = [record(gate) for gate in gates]
        _write(arguments.output, json.dumps({**found, "gates": records}, indent=2) + "\n")
    if arguments.markdown:
        _write(arguments.markdown, placed(markdown(gates, found), arguments))
    print(table(gates))
    missed = [gate for gate in gates if not gate.passes]
    print(f"{len(gates) - len(missed)} of {len(gates)} gates reach what they must")
    return 1 if missed else 0


def placed(text: str, arguments: argparse.Namespace) -> str:
    """The file that is to hold the table: it may have a place for it."""
    file, suite = arguments.markdown, arguments.suite
    around = file.read_text() if file.exists() else ""
    before, begin, rest = around.partition(f"<!-- {suite} -->\n")
    _, end, after = rest.partition(f"<!-- /{suite} -->\n")
    return before + begin + text + end + after if begin and end else text


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
