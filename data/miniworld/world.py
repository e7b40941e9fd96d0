"""The four task families behind one door: `draw` an item, and say which split its content is in.

These worlds are small enough to repeat themselves, so a fresh seed is no held-out set. The split is
a hash of the content (problem image and question): an item is in the same split for every seed.
"""

import random
from hashlib import blake2b
from typing import Literal

from data.miniworld import chart, jigsaw, navigation, search
from data.miniworld.record import MiniRecord

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FAMILIES = {family.TASK: family for family in (search, navigation, jigsaw, chart)}
TASKS = tuple(FAMILIES)


def draw(task: str, rng: random.Random) -> MiniRecord:
    """One item of `task`, any split. Raises ValueError for an unknown task."""
    if task not in FAMILIES:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    return FAMILIES[task].draw(rng)


def content_hash(record: MiniRecord) -> int:
    """64-bit hash of what identifies an item: problem pixels and question."""
    content = record.problem_image.tobytes() + record.question.encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def split_of(record: MiniRecord) -> Split:
    """The split an item belongs to: 1/10 test, 1/10 validation, the rest train."""
    return {0: "test", 1: "validation"}.get(content_hash(record) % 10, "train")
