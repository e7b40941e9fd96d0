"""Preallocated, batched, ragged KV cache: rows of different lengths, append in place.

Legend: B rows, T new tokens, S key slots, K kv-heads, E head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.attention import CachedPlan, Samples
from modeling.config import LLMConfig


class KVCache:
    """Keys (after norm and rotation) and values of every layer, `(layers, B, K, capacity, E)`.

    `append` writes the new tokens of a forward behind each row's cached ones; only `advance` makes
    them count. A forward without `advance` therefore leaves the cache as it was (its slots are
    written again by the next one).
    """

    def __init__(
        self,
        config: LLMConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        # zeros, not empty: masked slots are multiplied by zero weights and must be finite
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity
        self.extent = 0  # host-side upper bound of `lengths`

    def __len__(self) -> int:
        return self.keys.shape[1]

    def plan(self, samples: Samples) -> CachedPlan:
        """Plan for appending `samples` (one entry per row)."""
        if len(samples) != len(self):
            raise ValueError(f"{len(samples)} samples for a cache of {len(self)} rows")
        extent = self.extent + max(sum(split.length for split in splits) for splits in samples)
        if extent > self.capacity:
            raise ValueError(f"cache of {self.capacity} slots per row cannot hold {extent}")
        return CachedPlan(samples, self.lengths, extent)

    def append(self, layer: int, k: Tensor, v: Tensor, plan: CachedPlan) -> tuple[Tensor, Tensor]:
        """Store (T, K, E) keys and values; return views (B, K, S, E) of all that may be seen."""
        keys, values = self.keys[layer], self.values[layer]
        keys[plan.rows, :, plan.slots] = k.to(keys.dtype)
        values[plan.rows, :, plan.slots] = v.to(values.dtype)
        return keys[:, :, : plan.extent], values[:, :, : plan.extent]

    def advance(self, new_tokens: Tensor, next_positions: Tensor, longest: int) -> None:
        """Count the appended tokens.

        Args:
            new_tokens: (B,) how many of the appended tokens to keep, per row.
            next_positions: (B,) rotary position that follows, per row.
            longest: host-side maximum of `new_tokens`.
        """
        # new tensors, not in-place: a plan may still hold the old lengths
        self.lengths = self.lengths + new_tokens
        self.positions = next_positions.clone()
        self.extent += longest

    def branch(self, rows: int | None = None) -> "KVCache":
        """A view of the first rows (default: all) that goes on by itself: what it appends lies
        behind the tokens cached here, where this cache writes its own later. No copy is made.
        """
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, :rows], self.values[:, :rows]
        part.lengths, part.positions = self.lengths[:rows], self.positions[:rows]
        part.capacity, part.extent = self.capacity, self.extent
        return part

    def select(self, rows: Sequence[int], capacity: int | None = None) -> "KVCache":
        """A cache of copies of the given rows (a row may be named several times).

        Args:
            capacity: slots per row of the copy; default: as many as here.
        """
        return KVCache.joined([(self, rows)], capacity or self.capacity)

    @classmethod
    def joined(cls, parts: Sequence[tuple["KVCache", Sequence[int]]], capacity: int) -> "KVCache":
        """A cache of copies of the given rows of several caches, one part after another."""
        extent = max(part.extent for part, _ in parts)
        if extent > capacity:
            raise ValueError(f"cache of {capacity} slots per row cannot hold {extent}")
        model = parts[0][0]
        total = sum(len(rows) for _, rows in parts)
        layers, _, heads, _, size = model.keys.shape
        joint = object.__new__(KVCache)
        joint.keys = model.keys.new_zeros(layers, total, heads, capacity, size)
        joint.values = torch.zeros_like(joint.keys)
        lengths, positions, start = [], [], 0
        for part, rows in parts:
            index = torch.tensor(list(rows), dtype=torch.long, device=part.keys.device)
            here, used = slice(start, start + len(index)), slice(part.extent)
            joint.keys[:, here, :, used] = part.keys[:, index, :, used]
            joint.values[:, here, :, used] = part.values[:, index, :, used]
            lengths.append(part.lengths[index])
            positions.append(part.positions[index])
            start += len(index)
        joint.lengths, joint.positions = torch.cat(lengths), torch.cat(positions)
        joint.capacity, joint.extent = capacity, extent
        return joint
