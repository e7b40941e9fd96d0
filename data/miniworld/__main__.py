"""Draw the miniature world to disk.

    python -m data.miniworld --output datasets --train 6000 --validation 300 --test 500 --seed 0
    python -m data.miniworld --preview sheet.png

The first writes <output>/<Task>/data/*.parquet for the four task families (numbers are per task),
the second a picture to look at. Seconds on two cores.
"""

import argparse
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from data.miniworld.preview import contact_sheet
from data.miniworld.world import SPLITS, TASKS
from data.miniworld.write import SHARD_ROWS, shard_count, write_shards

PROCESSES = 2


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it asks; bad arguments exit with a message."""
    parser = _parser()
    args = parser.parse_args(arguments)
    sizes = {split: getattr(args, split) for split in SPLITS}
    if bad := [f"--{split} {n}" for split, n in sizes.items() if n < 0]:
        parser.error(f"{', '.join(bad)}: give a number of rows, 0 or more")
    if args.output is None and args.preview is None:
        parser.error("nothing to do: give --output FOLDER, --preview FILE.png or both")
    try:
        if args.preview is not None:
            contact_sheet(args.seed).save(args.preview)
        if args.output is not None:
            write_world(args.output, sizes, args.seed, args.overwrite)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def write_world(root: Path, sizes: dict[str, int], seed: int, overwrite: bool = False) -> None:
    """Write every task and split with `sizes[split]` rows per task.

    All is written into a hidden folder inside `root` and moved into place at the end, so an
    interrupted run leaves no half data set. Raises FileExistsError if a task's folder is not empty.
    """
    targets = {task: root / task / "data" for task in TASKS}
    full = [folder for folder in targets.values() if folder.exists() and any(folder.iterdir())]
    if full and not overwrite:
        raise FileExistsError(
            f"{full[0]} is not empty: choose another --output, or pass --overwrite to replace it"
        )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unfinished-") as aside:
        _write_all(Path(aside), sizes, seed)
        for task, folder in targets.items():
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(Path(aside) / task, folder)


def _write_all(aside: Path, sizes: dict[str, int], seed: int) -> None:
    """Spread the shards over processes; a split without duplicates is one piece of work."""
    work = []  # (task, split, rows of the split, shards, rows of those shards)
    for task in TASKS:
        (aside / task).mkdir()
        for split, n in sizes.items():
            shards = shard_count(n)
            if split != "train":
                work.append((task, split, n, range(shards), n))
                continue
            for shard in range(shards):
                rows = min(SHARD_ROWS, n - shard * SHARD_ROWS)
                work.append((task, split, n, range(shard, shard + 1), rows))
    # Spawned workers start clean: a fork of a process that already runs threads can hang.
    with (
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(w[-1] for w in work), unit="row", disable=not sys.stderr.isatty()) as bar,
    ):
        rows_of = {
            pool.submit(write_shards, aside / task, task, split, n, seed, shards): rows
            for task, split, n, shards, rows in work
        }
        for future in as_completed(rows_of):
            future.result()
            bar.update(rows_of[future])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.miniworld",
        description="Write the miniature world in the released layout, or a preview picture of it.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, help="root folder of the data sets")
    parser.add_argument("--train", type=int, default=6000, help="training rows per task")
    parser.add_argument("--validation", type=int, default=300, help="validation rows per task")
    parser.add_argument("--test", type=int, default=500, help="test rows per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace existing task folders")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="write a contact sheet")
    return parser


if __name__ == "__main__":
    main()
