"""Compare this model with folders of stored reference numbers: python -m tests.check_goldens DIR

DIR is a flat folder, or a parent of several. Every known check whose files are there runs and
prints a line per compared quantity: its largest difference, the tolerance, ok or MISS. Known checks
without data are named, other files ignored.
Exit code 0 = all hold, 1 = a miss, 2 = nothing to check.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

# importing a module registers its checks
from tests.golden_checks import decoder, distillation, drawing, names, packing, vision  # noqa: F401
from tests.golden_checks.core import CHECKS, Absent, Check, Golden, Result


def run_checks(folders: list[Path]) -> tuple[list[Result], set[str]]:
    """Run all checks on all folders, printing as they go. Returns results and names that ran."""
    results: list[Result] = []
    ran: set[str] = set()
    for folder in folders:
        golden = Golden(folder)
        for entry in sorted(CHECKS, key=lambda entry: entry.name):
            if golden.has(entry.files):
                results += _run(entry, golden)
                ran.add(entry.name)
    return results, ran


def _run(entry: Check, golden: Golden) -> list[Result]:
    start, results = time.perf_counter(), []
    for result in entry.run(golden):
        if isinstance(result, Absent):
            print(f"{result.name:<46} absent ({result.reason})", flush=True)
            continue
        results.append(result)
        print(
            f"{result.name:<46} {result.difference:10.3g} {result.unit:<5} "
            f"tolerance {result.tolerance:<8.3g} {'ok' if result.ok else 'MISS'}",
            flush=True,
        )
    if time.perf_counter() - start > 5:
        print(f"  ({entry.name} took {time.perf_counter() - start:.0f} s)")
    return results


def find_folders(path: Path) -> list[Path]:
    """`path` and its immediate sub-folders, those that hold data of a known check."""
    candidates = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    return [c for c in candidates if any(Golden(c).has(entry.files) for entry in CHECKS)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.check_goldens"
    )
    parser.add_argument("folder", type=Path, help="flat folder of stored numbers, or its parent")
    path = parser.parse_args(arguments).folder
    if not path.is_dir():
        print(f"{path} is not a folder: give one with stored reference numbers", file=sys.stderr)
        return 2
    folders = find_folders(path)
    if not folders:
        print(
            f"{path} holds no data of a known check; known files: "
            f"{', '.join(sorted({entry.files[0] for entry in CHECKS}))}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    results, ran = run_checks(folders)
    for entry in sorted(CHECKS, key=lambda entry: entry.name):
        if entry.name not in ran:
            print(f"{entry.name:<46} absent (needs {', '.join(entry.files)})")
    misses = [result for result in results if not result.ok]
    print(f"{len(results)} comparisons in {len(ran)} checks, {len(misses)} MISS")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
