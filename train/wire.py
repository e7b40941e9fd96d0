"""What goes over the wire in an optimizer step: the collectives that torch runs for
`train.parallel.wrap`, counted to the call and the byte.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from modeling.config import BagelConfig
from train.cost import (
    BF16,
    FP32,
    Scope,
    decoder_layer,
    parameters,
    vision_layer,
    vision_stem,
)

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Collective:
    """Calls of one kind at one place of an optimizer step, of one rank.

    payload: bytes of the full tensor of all calls together (of an all-reduce, of its tensor).
    """

    place: str
    kind: Kind
    calls: int
    payload: int
    ranks: int  # that take part
    between_replicas: bool = False

    @property
    def received(self) -> float:
        """Bytes that a rank receives with a ring, the least there is."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.payload * (self.ranks - 1) / self.ranks


def fsdp_units(
    config: BagelConfig, num_shard: int, itemsize: int = FP32, scope: Scope = "und"
) -> list[int]:
    """Values of the flat parameter of each FSDP unit: Bagel, decoder layers, encoder layers.

    FSDP aligns each tensor to 16 bytes of the compute dtype (`itemsize`), and a unit to `num_shard`
    values.
    """
    D, d = config.llm.hidden_size, config.vit.hidden_size
    # in the order of the module: text model, head, encoder, connector
    V = config.llm.vocab_size
    stem = vision_stem(config)
    bagel = [V * D, D, V * D, *stem, d * D, D, D * D, D]
    layer = decoder_layer(config)
    if scope == "all":  # where these stand among the others decides no more than padding
        L = config.latent_dim
        bagel, layer = [*bagel, D, 256 * D, D, D * D, D, L * D, D, D * L, L], layer * 2
    llm, vit = config.llm.num_hidden_layers, config.vit_layers_used
    units = [bagel, *[layer] * llm, *[vision_layer(config)] * vit]
    return [_flat(unit, 16 // itemsize, num_shard) for unit in units]


def _flat(tensors: Sequence[int], align: int, num_shard: int) -> int:
    total = 0
    for count in tensors:
        total += -total % align + count
    return total + -total % num_shard


def wire_bytes(
    config: BagelConfig,
    mesh: tuple[int, int],
    micro_steps: int,
    compute_itemsize: int = BF16,
    distils: bool = True,
    scope: Scope = "und",
) -> list[Collective]:
    """Collectives of one optimizer step on a (replicate, shard) mesh, of one rank.

    As torch runs them for `train.parallel.wrap`: a unit is gathered for every forward and again
    for its backward (recomputation does not gather), in the compute dtype; gradients are scattered
    in float32 in every micro step and then summed over the replicas. `distils`: with a teacher
    forward per micro step and a rollout copy per step, which summons float32. With
    shard = 1, DDP sums float32 gradients in every micro step (in buckets, counted as one call).

    Not counted: scalars (loss, gradient norm, metrics), launch gates, validation, checkpoints.
    """
    replicate, shard = mesh
    if replicate * shard == 1:
        return []
    if shard == 1:
        payload = FP32 * parameters(config).of(scope) * micro_steps
        return [
            Collective("gradients", "all_reduce", micro_steps, payload, replicate, replicate > 1)
        ]
    units = fsdp_units(config, shard, compute_itemsize, scope)
    found = _sharded(len(units), sum(units), mesh, micro_steps, compute_itemsize)
    teaching = ("rollout copy", "teacher forward")
    return [c for c in found if distils or c.place not in teaching]


def _sharded(
    calls: int, values: int, mesh: tuple[int, int], micro_steps: int, compute_itemsize: int
) -> Iterator[Collective]:
    replicate, shard = mesh
    many = calls * micro_steps
    in_compute, in_float = values * compute_itemsize * micro_steps, values * FP32 * micro_steps
    yield Collective("rollout copy", "all_gather", calls, values * FP32, shard)
    yield Collective("teacher forward", "all_gather", many, in_compute, shard)
    yield Collective("student forward", "all_gather", many, in_compute, shard)
    yield Collective("student backward", "all_gather", many, in_compute, shard)
    yield Collective("gradients", "reduce_scatter", many, in_float, shard)
    yield Collective("gradients", "all_reduce", many, in_float // shard, replicate, True)


def gather_sweep(count: float, ranks: int, itemsize: int = BF16) -> float:
    """Bytes that a rank receives to hold `count` parameters once."""
    return count * itemsize * (ranks - 1) / ranks
