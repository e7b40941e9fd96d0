"""Preallocated, batched, ragged KV cache: rows of different lengths, append in place, each layer's
keys and values on the device of the layer.

Legend: B rows, T new tokens, S key slots, K kv-heads, E head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.attention import Backend, CachedPlan, FreshPlan, Samples, chosen_backend
from modeling.config import LLMConfig


@dataclass(frozen=True)
class Store:
    """The layers of one device."""

    keys: Tensor  # (layers, B, K, capacity, E), after norm and rotation
    values: Tensor  # (layers, B, K, capacity, E)

    def fits(
        self,
        config: LLMConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> bool:
        """Whether so many rows of so many slots of such a model have room here."""
        layers, here, kv_heads, slots, head_dim = self.keys.shape
        wanted = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        alike = (layers, kv_heads, head_dim) == wanted
        alike = alike and (self.keys.dtype, self.keys.device) == (dtype, device)
        return alike and here >= rows and slots >= capacity


class KVCache:
    """Keys (after norm and rotation) and values of every layer, and how many of them count.

    `append` writes the new tokens of a forward behind each row's cached ones; only `advance` makes
    them count. A forward without `advance` therefore leaves the cache as it was (its slots are
    written again by the next one).

    `keys` and `values` are those of all layers, unless these are spread over several devices: then
    of the ones that are on the first layer's (`device`, which has lengths and positions as well).

    Args:
        device: of all layers, or one for each.
        store: memory to use, on one device; its first rows are the cache's.
    """

    def __init__(
        self,
        config: LLMConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
        store: Store | None = None,
    ) -> None:
        layers = config.num_hidden_layers
        if isinstance(device, (torch.device, str)):
            device = [device] * layers
        if len(device) != layers:
            raise ValueError(f"{len(device)} devices for {layers} layers: give one for each")
        devices = [torch.device(one) for one in device]
        shape = batch, config.num_key_value_heads, capacity, config.head_dim
        # per layer: its device, and its place among the layers there
        self.places = tuple((home, devices[:i].count(home)) for i, home in enumerate(devices))
        if store is None:
            stores = {
                home: _zeros(devices.count(home), shape, dtype, home)
                for home in dict.fromkeys(devices)
            }
        else:
            stores = {devices[0]: Store(store.keys[:, :batch], store.values[:, :batch])}
            capacity = store.keys.shape[3]
        first = stores.pop(devices[0])
        self.keys, self.values = first.keys, first.values  # of the layers on the first device
        self.others = stores  # of layers on other devices
        self.lengths = torch.zeros(batch, dtype=torch.long, device=devices[0])
        self.positions = torch.zeros(batch, dtype=torch.long, device=devices[0])
        self.capacity = capacity
        self.extent = 0  # host-side upper bound of `lengths`

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where lengths and positions are: the device of the first layer."""
        return self.lengths.device

    def plan(self, samples: Samples, backend: Backend = "auto") -> CachedPlan | FreshPlan:
        """Plan for appending `samples` (one entry per row); `backend` counts for an empty cache."""
        if len(samples) != len(self):
            raise ValueError(f"{len(samples)} samples for a cache of {len(self)} rows")
        extent = self.extent + max(sum(split.length for split in splits) for splits in samples)
        if extent > self.capacity:
            raise ValueError(f"cache of {self.capacity} slots per row cannot hold {extent}")
        if not self.extent and chosen_backend(samples, self.device, backend) != "sdpa":
            return FreshPlan(samples, self.device, backend)
        return CachedPlan(samples, self.lengths, extent)

    def append(
        self, layer: int, k: Tensor, v: Tensor, plan: CachedPlan | FreshPlan
    ) -> tuple[Tensor, Tensor]:
        """Store (T, K, E) keys and values; return what the plan takes: views (B, K, S, E) of all
        that may be seen, or in an empty cache the new ones themselves.

        Args:
            plan: that of this forward, on the device of the layer.
        """
        device, place = self.places[layer]
        store = self.others.get(device, self)
        keys, values = store.keys[place], store.values[place]
        keys[plan.rows, :, plan.slots] = k.to(keys.dtype)
        values[plan.rows, :, plan.slots] = v.to(values.dtype)
        if isinstance(plan, FreshPlan):
            return k, v
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

    def move(self, sources: Tensor, targets: Tensor, extent: int) -> None:
        """Copy rows over others, in place: the first `extent` slots of their keys and values.

        Only for layers on one device; lengths and positions stay as they are.
        """
        for tensor in (self.keys, self.values):
            tensor[:, targets, :, :extent] = tensor[:, sources, :, :extent]

    def branch(self, rows: int | None = None) -> "KVCache":
        """A view of the first rows (default: all) that goes on by itself: what it appends lies
        behind the tokens cached here, where this cache writes its own later. No copy is made.
        """
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, :rows], self.values[:, :rows]
        part.others = {
            device: Store(store.keys[:, :rows], store.values[:, :rows])
            for device, store in self.others.items()
        }
        part.places = self.places
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
        caches = [part for part, _ in parts]
        indices = [torch.tensor(list(rows), dtype=torch.long) for _, rows in parts]
        extents = [cache.extent for cache in caches]
        joint = object.__new__(KVCache)
        first = _joined(caches, indices, extents, capacity)
        joint.keys, joint.values = first.keys, first.values
        joint.others = {
            device: _joined([cache.others[device] for cache in caches], indices, extents, capacity)
            for device in caches[0].others
        }
        joint.places = caches[0].places
        chosen = [
            (cache, index.to(cache.device)) for cache, index in zip(caches, indices, strict=True)
        ]
        joint.lengths = torch.cat([cache.lengths[index] for cache, index in chosen])
        joint.positions = torch.cat([cache.positions[index] for cache, index in chosen])
        joint.capacity, joint.extent = capacity, extent
        return joint


def _zeros(layers: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Store:
    # zeros, not empty: masked slots are multiplied by zero weights and must be finite
    keys = torch.zeros(layers, *shape, dtype=dtype, device=device)
    return Store(keys, torch.zeros_like(keys))


def _joined(
    stores: Sequence["Store | KVCache"],
    indices: Sequence[Tensor],
    extents: Sequence[int],
    capacity: int,
) -> Store:
    """Copies of the given rows of stores on one device, one store after another."""
    layers, _, heads, _, size = stores[0].keys.shape
    total = sum(map(len, indices))
    keys = stores[0].keys.new_zeros(layers, total, heads, capacity, size)
    joint, start = Store(keys, torch.zeros_like(keys)), 0
    for store, index, extent in zip(stores, indices, extents, strict=True):
        rows = index.to(keys.device)
        here, used = slice(start, start + len(rows)), slice(extent)
        joint.keys[:, here, :, used] = store.keys[:, rows, :, used]
        joint.values[:, here, :, used] = store.values[:, rows, :, used]
        start += len(rows)
    return joint
