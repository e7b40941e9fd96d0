"""Write the miniature world as parquet shards in the released layout.

    <root>/<Task>/data/{train,validation,test}-00000-of-00004.parquet

Columns and their spelling ("resoning_thought_*" included) are those of the released data sets.
Readers select training files by the word "train" in the name, so no other split may contain it.
Every shard has its own random stream, keyed by (seed, task, split, shard): shards can be written in
any order.
"""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.miniworld.record import MiniRecord
from data.miniworld.world import SPLITS, TASKS, Split, content_hash, draw, split_of

ROW_GROUP = 128
SHARD_ROWS = 512
# A split that yields nothing new in this many draws is taken to be exhausted.
MAX_FRUITLESS_DRAWS = 20_000

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("pid", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("problem_image_0", IMAGE_TYPE),
        ("resoning_thought_0", pa.string()),
        ("reasoning_image_0", IMAGE_TYPE),
        ("resoning_thought_1", pa.string()),
        ("task", pa.string()),
        ("full_text_only_thought", pa.string()),
    ]
)


def shard_count(n: int, shard_rows: int = SHARD_ROWS) -> int:
    """Shards needed for n rows."""
    return -(-n // shard_rows)


def write_shards(
    folder: str | Path,
    task: str,
    split: Split,
    n: int,
    seed: int,
    shards: range,
    shard_rows: int = SHARD_ROWS,
) -> list[Path]:
    """Write the given shards of an `n`-row split straight into `folder`.

    Duplicates are kept out within one call only: validation and test need all shards in one call.
    """
    _check(task, split, n, shard_rows)
    Path(folder).mkdir(parents=True, exist_ok=True)
    seen: set[int] | None = None if split == "train" else set()
    total = shard_count(n, shard_rows)
    written = []
    for shard in shards:
        first = shard * shard_rows
        rng = random.Random(f"{seed}/{task}/{split}/{shard}")
        rows = min(shard_rows, n - first)
        records = split_records(task, split, rows, rng, seen)
        table = pa.Table.from_pylist(
            [
                table_row(record, f"{split}-s{seed}-{first + i:06d}")
                for i, record in enumerate(records)
            ],
            schema=SCHEMA,
        )
        path = Path(folder) / f"{split}-{shard:05d}-of-{total:05d}.parquet"
        pq.write_table(table, path, row_group_size=ROW_GROUP)
        written.append(path)
    return written


def split_records(
    task: str, split: Split, n: int, rng: random.Random, seen: set[int] | None = None
) -> Iterator[MiniRecord]:
    """`n` records whose content belongs to `split`; with `seen`, none whose hash is in it.

    Raises ValueError when the split has no new items left.
    """
    found = fruitless = 0
    while found < n:
        record = draw(task, rng)
        key = content_hash(record)
        if split_of(record) != split or (seen is not None and key in seen):
            fruitless += 1
            if fruitless >= MAX_FRUITLESS_DRAWS:
                raise ValueError(
                    f"{task} has no new {split} items left after {found} of {n}: ask for fewer"
                )
            continue
        if seen is not None:
            seen.add(key)
        found, fruitless = found + 1, 0
        yield record


def table_row(record: MiniRecord, pid: str) -> dict:
    """A record as one row of the released columns."""
    return {
        "pid": pid,
        "question": record.question,
        "answer": record.answer,
        "problem_image_0": _image_cell(record.problem_image, f"{pid}-problem.png"),
        "resoning_thought_0": record.thoughts[0],
        "reasoning_image_0": _image_cell(record.visual_thought, f"{pid}-thought.png"),
        "resoning_thought_1": record.thoughts[1],
        "task": record.task,
        "full_text_only_thought": record.full_text_only_thought,
    }


def _image_cell(image: Image.Image, path: str) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": path}


def _check(task: str, split: str, n: int, shard_rows: int) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if n < 0 or shard_rows < 1:
        raise ValueError(f"need n >= 0 and shard_rows >= 1, got n={n}, shard_rows={shard_rows}")
