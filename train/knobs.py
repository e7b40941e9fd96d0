"""Which knobs there are to make a run fit, and what is enough."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from train.config import UsageError
from train.memory import Setup, fits
from train.timing import step_seconds

FULL_IMAGE = 4900  # patches of the largest image that the encoder takes, 980 x 980


def knobs(s: Setup) -> dict[str, dict[str, Any]]:
    """Flag as it is typed -> what it changes."""
    found: dict[str, dict[str, Any]] = {}
    if s.mode == "inference":
        return {"--global_batch 1": {"global_batch": 1}} if s.global_batch > 1 else {}
    if s.dense and s.machine.name != "cpu":
        found["--attention_backend flex"] = {"attention_backend": "flex"}
    if not s.activation_checkpointing:
        found["--activation_checkpointing True"] = {"activation_checkpointing": True}
    if s.micro_batch > 1:
        found["--micro_batch 1"] = {"micro_batch": 1}
    if s.shard < s.world and s.adam_moments == "resident":
        found[f"--num_shard {s.world}"] = {"num_shard": s.world}
    if s.adam_moments == "resident" and s.strategy == "alone":
        found["--adam_moments host"] = {"adam_moments": "host"}
    if s.averages:
        found["--teacher_mode self"] = {"teacher_mode": "self"}
    return found


def turned(s: Setup, flags: Sequence[str]) -> Setup:
    """The run with these of its knobs turned."""
    changes = knobs(s)
    return dataclasses.replace(s, **{k: v for flag in flags for k, v in changes[flag].items()})


def remedy(s: Setup) -> list[str] | None:
    """The fewest knobs that make it fit, if any do; among as many, those that leave alone what is
    learned, then faster ones.
    """
    flags = knobs(s)
    for count in range(1, len(flags) + 1):
        enough = [c for c in itertools.combinations(flags, count) if fits(turned(s, c))]
        if enough:
            return list(
                min(enough, key=lambda c: ("--teacher_mode self" in c, step_seconds(turned(s, c))))
            )
    return None


def gpus_needed(s: Setup) -> tuple[int, list[str]] | None:
    """GPUs of this kind, all sharing the weights, on which it fits, and the knobs to turn there;
    none that changes what is learned.
    """
    for world in (2, 4, 8, 16, 32, 64):
        if world > s.world and s.mode != "inference":
            rows = -(-s.global_batch // world) * world
            there = dataclasses.replace(
                s, world=world, num_shard=world, global_batch=rows, adam_moments="resident"
            )
            flags = [] if fits(there) else remedy(there)
            if flags is not None and "--teacher_mode self" not in flags:
                return world, flags
    return None


def largest_image(s: Setup) -> int:
    """Tokens of the largest problem image that fits with all else equal; a multiple of 50."""
    found = s.case.image
    for image in range(found // 50 * 50 + 50, FULL_IMAGE + 1, 50):
        try:
            larger = dataclasses.replace(s, case=dataclasses.replace(s.case, image=image))
        except UsageError:  # no room for a completion under the cap
            break
        if not fits(larger):
            break
        found = image
    return found
