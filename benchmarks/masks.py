"""C8 and C9: attention masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, plain
from benchmarks.gates import Check, Gate, Settings, at_most
from modeling.attention import packed_plan, split_mask
from modeling.sequence import Split

Splits = tuple[Split, ...]

BLOCK = 128  # queries and keys of one block of an attention mask
PADDED = 16_384  # length to which the release pads every packed sequence


def split_sample(*lengths: int) -> Splits:
    """Positive lengths are texts, negative ones images."""
    return tuple(Split(abs(n), "causal" if n > 0 else "full") for n in lengths)


TEACHER_10K = split_sample(62, -2502, 130, -2502, -2502, 42, 1600, -502, 398)  # 10,240 tokens
PACKS = {
    "student S": [split_sample(60, -1298, 140, 258)],
    "student M": [split_sample(60, -2502, 140, 402)],
    "teacher M": [split_sample(60, -2502, 140, 30, -2502, 30, 402)],
    "student L": [split_sample(60, -4902, 140, 402)],
    "teacher 10,240": [TEACHER_10K],
    "four students": [
        split_sample(60, -n, 140, m) for n, m in ((1298, 90), (486, 377), (902, 30), (1298, 611))
    ],
}


def computed_blocks(samples: list[Splits]) -> int:
    """Blocks of queries and keys that FlexAttention goes through."""
    mask = packed_plan(samples, "cpu", "flex").block_mask
    full = 0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    return int(mask.kv_num_blocks.sum()) + full


def needed_blocks(samples: list[Splits]) -> int:
    """Blocks in which any query may look at any key, from the definition of the mask."""
    dense = [split_mask(splits) for splits in samples]
    total, start = sum(map(len, dense)), 0
    side = -(-total // BLOCK)
    any_seen = torch.zeros(side * BLOCK, side * BLOCK, dtype=torch.bool)
    for mask in dense:
        here = slice(start, start + len(mask))
        any_seen[here, here] = mask
        start += len(mask)
    return int(any_seen.view(side, BLOCK, side, BLOCK).any(3).any(1).sum())


def listed_blocks(samples: list[Splits]) -> Check:
    """Blocks that are left out although something is seen there, or taken as full and are not."""
    mask = packed_plan(samples, "cpu", "flex").block_mask
    dense = torch.block_diag(*(split_mask(splits).int() for splits in samples)).bool()
    side = -(-len(dense) // BLOCK)
    seen = torch.zeros(side * BLOCK, side * BLOCK, dtype=torch.bool)
    seen[: len(dense), : len(dense)] = dense
    blocks = seen.view(side, BLOCK, side, BLOCK).transpose(1, 2).flatten(2)  # (side, side, .)
    partial = _listed(mask.kv_num_blocks, mask.kv_indices, side)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices, side)
    missed = blocks.any(2) & ~(partial | full)
    wrong = int(missed.sum()) + int((full & ~blocks.all(2)).sum())
    return Check("blocks of the mask that are wrong", wrong, 0)


def _listed(count: Tensor, indices: Tensor, side: int) -> Tensor:
    """(side, side) bool from FlexAttention's lists, batch and head 0."""
    count, indices = count[0, 0], indices[0, 0]
    table = torch.zeros(max(side, len(count)), max(side, indices.shape[1]), dtype=torch.bool)
    for row, number in enumerate(count.tolist()):
        table[row, indices[row, :number].long()] = True
    return table[:side, :side]


def c8(settings: Settings) -> list[Gate]:
    """Building the mask of a long sequence."""
    samples = [TEACHER_10K]
    made = {}

    def build(name: str, work: Callable[[], Any]) -> Callable[[], measure.Work]:
        made.pop(name, None)
        # without gradient, as the teacher's: sequences of this length are its own
        return lambda: lambda: made.update({name: torch.no_grad()(work)()})

    timing = measure.paired(
        build("plain", lambda: plain.additive_mask(TEACHER_10K, torch.device("cpu"))),
        build("ours", lambda: packed_plan(samples, "cpu", "flex")),
        settings.repeats,
    )
    held = {name: measure.held_bytes(thing) / measure.MB for name, thing in made.items()}
    made.clear()
    check = (listed_blocks([split_sample(60, -1298, 140, 258), split_sample(20, -300, 9)]),)
    what = "attention mask of 10,240 tokens"
    detail = {"plain_mb": held["plain"], "plain_ms": 1e3 * timing.baseline_s}
    return [
        at_most("C8", f"{what}, held", held["ours"], "MB", 1, 0.1, check, detail=detail),
        at_most(
            "C8",
            f"{what}, time to build",
            1e3 * timing.ours_s,
            "ms",
            100,
            30,
            check,
            spread=f"{timing.spread} x plain",
            detail=detail,
        ),
    ]


def c9(settings: Settings) -> list[Gate]:
    """Blocks of attention that are computed, against those that are needed."""
    computed = {name: computed_blocks(samples) for name, samples in PACKS.items()}
    needed = {name: needed_blocks(samples) for name, samples in PACKS.items()}
    padding = {
        name: needed_blocks([*samples, split_sample(PADDED - _length(samples))]) / needed[name]
        for name, samples in PACKS.items()
        if name in ("student S", "student M")
    }
    worst = max(computed[name] / needed[name] for name in PACKS)
    return [
        at_most(
            "C9",
            "attention blocks, computed / needed, worst of six packs",
            worst,
            "x",
            1.02,
            1.0,
            checks=tuple(listed_blocks(PACKS[name]) for name in ("student S", "four students")),
            detail={"computed": computed, "needed": needed, "padded_to_16384": padding},
        )
    ]


def _length(samples: list[Splits]) -> int:
    return sum(split.length for splits in samples for split in splits)
