"""Packed attention behind one interface: SDPA (always), FlexAttention, flash-attn when installed.

A plan is built once per forward and shared by all layers: `plan(q, k, v) -> (T, H, E)`; where these
are spread over devices, `plan.to(device)` is built once for each. Who sees whom follows from the
attention splits of each sample: a query sees everything in earlier splits of its sample; inside its
own split a "causal" one sees up to itself, a "full" or "noise" one sees all of it. Noise splits are
invisible from outside. With a cache, new tokens come after the cached ones (bottom-right
alignment).

Legend: T packed tokens, B samples (cache rows), L padded length, S key slots, H heads, K kv-heads,
E head_dim.
"""

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modeling.sequence import Split

Backend = Literal["auto", "sdpa", "flex", "flash"]
Samples = Sequence[Sequence[Split]]
BLOCK = 128  # tokens of a FlexAttention block: what it skips, it skips by blocks


class Plan(ABC):
    """The attention of one forward, for tensors on `device`."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._elsewhere: dict[torch.device, Plan] = {}

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, E) -> (T, H, E); k and v are (T, K, E), or cache views."""

    @abstractmethod
    def _rebuilt(self, device: torch.device) -> "Plan": ...

    def to(self, device: torch.device | str | int) -> "Plan":
        """The same attention for tensors on another device; built when first asked for."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = self._rebuilt(device)
        return self._elsewhere[device]


def packed_plan(samples: Samples, device: torch.device | str, backend: Backend = "auto") -> Plan:
    """Attention among the tokens of a packed sequence: q (T, H, E), k and v (T, K, E)."""
    backend = chosen_backend(samples, device, backend)
    if backend == "sdpa":
        return SDPAPlan(samples, device)
    if backend == "flex":
        return FlexPlan(samples, device)
    if backend == "flash":
        return FlashPlan(samples)
    raise ValueError(f"attention backend {backend!r} is unknown: choose auto, sdpa, flex or flash")


def chosen_backend(samples: Samples, device: torch.device | str, backend: Backend) -> Backend:
    """What "auto" stands for: FlexAttention on CUDA, SDPA elsewhere and for pictures alone, which
    need no mask.
    """
    if backend != "auto":
        return backend
    on_cuda = torch.device(device).type == "cuda"
    return "flex" if on_cuda and not _all_full(samples) else "sdpa"


def _all_full(samples: Samples) -> bool:
    """Whether every token sees all of its sample."""
    return all(len(splits) == 1 and splits[0].mode != "causal" for splits in samples)


def split_mask(splits: Sequence[Split], device: torch.device | str = "cpu") -> Tensor:
    """Dense (L, L) bool mask of one sample, True = may attend: the definition of all plans."""
    limit, block, noise = (rule.to(device) for rule in _token_rules(splits))
    keys = torch.arange(len(limit), device=device)
    visible = keys[None, :] <= limit[:, None]
    return visible & (~noise[None, :] | (block[:, None] == block[None, :]))


def _token_rules(splits: Sequence[Split]) -> tuple[Tensor, Tensor, Tensor]:
    """Per token of a sample: last visible key (int64), split number (int64), is noise (bool)."""
    lengths = torch.tensor([split.length for split in splits], dtype=torch.long)
    ends = lengths.cumsum(0) - 1
    block = torch.repeat_interleave(torch.arange(len(splits)), lengths)
    causal = torch.tensor([split.mode == "causal" for split in splits], dtype=torch.bool)[block]
    noise = torch.tensor([split.mode == "noise" for split in splits], dtype=torch.bool)[block]
    return torch.where(causal, torch.arange(len(block)), ends[block]), block, noise


class _Padding:
    """Packed (T, ...) <-> padded (B, L, ...). Equal lengths are a plain reshape."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.batch, self.longest = len(lengths), max(lengths)
        self.uniform = all(length == self.longest for length in lengths)
        if not self.uniform:
            lens = torch.tensor(lengths)
            slot = torch.arange(self.longest)[None, :].expand(self.batch, -1)
            inside = slot < lens[:, None]
            start = lens.cumsum(0) - lens
            # padding repeats token 0 of its sample (of an empty one, some other token): finite
            # values that nobody reads
            token = (start[:, None] + torch.where(inside, slot, 0)).clamp(max=int(lens.sum()) - 1)
            self.gather = token.flatten().to(device)
            self.scatter = inside.flatten().nonzero().flatten().to(device)

    def pad(self, x: Tensor) -> Tensor:
        if not self.uniform:
            x = x.index_select(0, self.gather)
        return x.view(self.batch, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.reshape(self.batch * self.longest, *x.shape[2:])
        return x if self.uniform else x.index_select(0, self.scatter)


class _MaskedPlan(Plan):
    """Has a mask, True = may attend, or None where all see all."""

    mask: Tensor | None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores; made once for all layers."""
        if self.mask is None:
            return None
        if self._bias is None or self._bias.dtype != dtype:
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._bias = torch.where(self.mask, zero, -math.inf)
        return self._bias

    _bias: Tensor | None = None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, E) x (B, K, S, E) -> (B, H, L, E), scale 1/sqrt(E), grouped kv-heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class SDPAPlan(_MaskedPlan):
    """Exact for every mix of splits. Samples in which all see all (pictures) are taken together by
    their length, without mask or padding; others are padded to one length and masked.
    """

    def __init__(self, samples: Samples, device: torch.device | str) -> None:
        super().__init__(device)
        self.samples = samples
        lengths = [sum(split.length for split in splits) for splits in samples]
        all_full = _all_full(samples)
        self.groups = None if len(set(lengths)) == 1 or not all_full else _Groups(lengths, device)
        if self.groups is None:
            self.padding = _Padding(lengths, device)
            mask = not all_full
            self.mask = _padded_mask(samples, max(lengths), device) if mask else None
            self.parts = _query_parts(samples, max(lengths)) if mask else []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.groups is not None:
            return self.groups.attend(q, k, v)
        q, k, v = (self.padding.pad(x).transpose(1, 2) for x in (q, k, v))
        return self.padding.unpad(self._attend(q, k, v).transpose(1, 2))  # of (B, L, H, E)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries by parts, each with the keys up to the last one that any of it sees."""
        bias = self.bias(q.dtype)
        if len(self.parts) < 2:
            return _sdpa(q, k, v, bias)
        outs = [
            _sdpa(q[:, :, some], k[:, :, :end], v[:, :, :end], bias[:, :, some, :end])
            for some, end in self.parts
        ]
        return torch.cat(outs, dim=2)

    def _rebuilt(self, device: torch.device) -> "SDPAPlan":
        return SDPAPlan(self.samples, device)


class _Groups:
    """Packed samples by their length, each of which is seen by all of its own tokens."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        self.tokens: list[Tensor] = []  # per group (samples, length)
        for length in sorted(set(lengths) - {0}):
            first = starts[torch.tensor(lengths) == length]
            self.tokens.append(first[:, None] + torch.arange(length))
        order = torch.cat([tokens.flatten() for tokens in self.tokens])
        self.places = torch.empty_like(order)
        self.places[order] = torch.arange(len(order))
        self.tokens = [tokens.to(device) for tokens in self.tokens]
        self.places = self.places.to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for tokens in self.tokens:
            parts = (x.index_select(0, tokens.flatten()) for x in (q, k, v))
            rows = (x.view(*tokens.shape, *x.shape[1:]).transpose(1, 2) for x in parts)
            outs.append(_sdpa(*rows, None).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self.places)


def _query_parts(samples: Samples, longest: int) -> list[tuple[slice, int]]:
    """Parts of some BLOCK padded queries, and how many keys they need."""
    limits = [_token_rules(splits)[0] for splits in samples]
    size = -(-longest // max(1, longest // BLOCK))
    parts = []
    for start in range(0, longest, size):
        some = slice(start, min(start + size, longest))
        seen = [int(limit[some].max()) for limit in limits if len(limit) > start]
        parts.append((some, 1 + max(seen)))
    return parts


def _padded_mask(samples: Samples, longest: int, device: torch.device | str) -> Tensor:
    """(B, 1, L, L) bool. Padding queries look at key 0, so that their softmax stays finite."""
    limit = torch.zeros(len(samples), longest, dtype=torch.long)
    block = torch.full((len(samples), longest), -1)
    noise = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, splits in enumerate(samples):
        rules = _token_rules(splits)
        for target, values in zip((limit, block, noise), rules, strict=True):
            target[row, : len(values)] = values
    has_noise = bool(noise.any())
    limit, block, noise = limit.to(device), block.to(device), noise.to(device)
    keys = torch.arange(longest, device=device)
    mask = keys[None, None, :] <= limit[:, :, None]
    if has_noise:
        hidden = noise[:, None, :] & (block[:, :, None] != block[:, None, :])
        mask &= ~hidden | (block[:, :, None] < 0)
    return mask[:, None]


class FlexPlan(Plan):
    """FlexAttention over the packed sequence: no padding, and of the (T, T) mask only the blocks in
    which something is seen. They follow from the splits by arithmetic on the device; no table of
    pairs of tokens is made.
    """

    def __init__(self, samples: Samples, device: torch.device | str) -> None:
        super().__init__(device)
        self.samples = samples
        rules = _PackedRules(samples, self.device)
        self.block_mask = rules.block_mask()
        self.kernel = _flex_kernel(self.device.type)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, E)
        grouped = q.shape[1] != k.shape[1]
        out = self.kernel(q, k, v, block_mask=self.block_mask, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    def _rebuilt(self, device: torch.device) -> "FlexPlan":
        return FlexPlan(self.samples, device)


@functools.cache
def _flex_kernel(device_type: str) -> Callable[..., Tensor]:
    # Compiled on CUDA only: the eager kernel is the reference, and all that CPU tests need. Lengths
    # differ from batch to batch: one kernel for all. Rather an error than the eager kernel, which
    # makes all scores, should there be more kinds of batches than torch compiles.
    if device_type != "cuda":
        return flex_attention
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _mask_rule(first: Tensor | None, last: Tensor, own: Tensor | None) -> MaskRule:
    """FlexAttention's rule for a pair of tokens; see `_PackedRules`."""

    def of_one_sample(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= last[query]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key <= last[query])

    rule = of_one_sample if first is None else visible

    def without_noise(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(b, h, query, key) & ((own[key] < 0) | (own[key] == own[query]))

    return rule if own is None else without_noise


class _PackedRules:
    """Who sees whom in a packed sequence: a query sees the keys from `first` to `last`, without
    those of noise splits other than its own.
    """

    def __init__(self, samples: Samples, device: torch.device) -> None:
        splits = [split for sample in samples for split in sample]
        self.several = sum(map(bool, samples)) > 1
        self.total = sum(split.length for split in splits)
        columns, start = [], 0
        for sample in samples:
            first = start
            for split in sample:
                start += split.length
                causal, noise = split.mode == "causal", split.mode == "noise"
                columns.append((split.length, first, start - 1, causal, noise))
        lengths, firsts, lasts, causal, noise = torch.tensor(columns).to(device).unbind(1)

        def per_token(values: Tensor) -> Tensor:
            return torch.repeat_interleave(values, lengths, output_size=self.total)

        tokens = torch.arange(self.total, device=device, dtype=torch.int32)
        self.first = per_token(firsts.int())
        self.last = torch.where(per_token(causal.bool()), tokens, per_token(lasts.int()))
        self.own: Tensor | None = None  # the noise split of a token, -1 without
        if any(split.mode == "noise" for split in splits):
            numbers = torch.arange(len(splits), device=device, dtype=torch.int32)
            self.own = per_token(torch.where(noise.bool(), numbers, -1))

    def block_mask(self) -> BlockMask:
        """Blocks where all is seen, and blocks where something is; others are not computed."""
        some, every = self._blocks()
        full, partial = some & every, some & ~every
        return BlockMask.from_kv_blocks(
            *_listed(partial),
            *_listed(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_rule(self.first if self.several else None, self.last, self.own),
            seq_lengths=(self.total, self.total),
            compute_q_blocks=torch.is_grad_enabled(),  # the same by keys, for the backward pass
        )

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """(blocks, blocks) bool of queries and keys: something is seen, all is seen.

        Queries and what they see are in the order of the sequence, so that the smallest and the
        largest of a block tell what it sees.
        """
        count = -(-self.total // BLOCK)
        begin = torch.arange(count, device=self.first.device) * BLOCK
        end = (begin + BLOCK).clamp(max=self.total) - 1
        first, last = (self._by_block(x, count) for x in (self.first, self.last))
        some = (first.amin(1)[:, None] <= end) & (begin <= last.amax(1)[:, None])
        every = (first.amax(1)[:, None] <= begin) & (end <= last.amin(1)[:, None])
        # the last block is shorter than its kernel's: keys beyond the end are for the mask to hide
        every &= (begin + BLOCK <= self.total) & (begin + BLOCK <= self.total)[:, None]
        if self.own is not None:
            low, high = self._by_block(self.own, count).aminmax(dim=1)
            within_one = (low == high) & (low >= 0)  # keys of one noise split alone
            met = (low[:, None] <= high) & (low <= high[:, None])
            some &= ~within_one | met
            same = (low[:, None] == low) & (high[:, None] == low)
            every &= (high < 0) | (within_one & same)
        return some, every

    def _by_block(self, values: Tensor, count: int) -> Tensor:
        """(T,) -> (blocks, BLOCK), the last one filled with its last value."""
        missing = count * BLOCK - self.total
        return torch.cat([values, values[-1:].expand(missing)]).view(count, BLOCK)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K) bool -> how many key blocks each query block has, (1, 1, Q) int32, and which, these
    first: (1, 1, Q, K) int32.
    """
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


class FlashPlan(Plan):
    """flash-attn, one call per split over the prefix it sees: exact, no mask, no copies of keys."""

    def __init__(self, samples: Samples) -> None:
        super().__init__("cuda")
        try:
            self.kernel = importlib.import_module("flash_attn").flash_attn_func
        except ImportError as error:
            raise ImportError(
                "attention backend 'flash' needs the flash-attn package (pip install flash-attn) "
                "and a CUDA GPU; use --attention_backend sdpa or flex instead"
            ) from error
        # sample start, split start, split end, causal
        self.calls: list[tuple[int, int, int, bool]] = []
        start = 0
        for splits in samples:
            here = start
            for split in splits:
                if split.mode == "noise":
                    raise ValueError(
                        "backend 'flash' cannot hide noise splits: use 'sdpa' or 'flex'"
                    )
                self.calls.append((start, here, here + split.length, split.mode == "causal"))
                here += split.length
            start = here

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            self.kernel(q[None, lo:hi], k[None, start:hi], v[None, start:hi], causal=causal)[0]
            for start, lo, hi, causal in self.calls
        ]
        return torch.cat(parts)

    def _rebuilt(self, device: torch.device) -> "FlashPlan":
        return self  # it holds no tensors


class FreshPlan(Plan):
    """Attention among the first tokens of a cache, which see nothing but each other: that of the
    packed sequence. Knows where their keys are to be stored.
    """

    def __init__(self, samples: Samples, device: torch.device | str, backend: Backend) -> None:
        super().__init__(device)
        _refuse_noise(samples)
        self.samples, self.backend = samples, backend
        self.packed = packed_plan(samples, device, backend)
        lengths = torch.tensor([sum(split.length for split in splits) for splits in samples])
        slots = torch.cat([torch.arange(n) for n in lengths.tolist()])
        self.rows = torch.repeat_interleave(torch.arange(len(samples)), lengths).to(device)
        self.slots = slots.to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.packed(q, k, v)

    def _rebuilt(self, device: torch.device) -> "FreshPlan":
        return FreshPlan(self.samples, device, self.backend)


def _refuse_noise(samples: Samples) -> None:
    if any(split.mode == "noise" for splits in samples for split in splits):
        raise ValueError("noise splits cannot be cached")


class CachedPlan(_MaskedPlan):
    """Attention of new tokens over cached plus new keys; knows where new keys are to be stored.

    Lengths of the cached part are read on the device only, so building a plan never waits for it.
    """

    def __init__(self, samples: Samples, lengths: Tensor, extent: int) -> None:
        """Args:
        samples: splits of the new tokens, one entry per cache row.
        lengths: (B,) tokens cached so far, on the device.
        extent: host-side upper bound of cached + new tokens of any row.
        """
        super().__init__(lengths.device)
        self.samples, self.lengths = samples, lengths
        device = self.device
        new = [sum(split.length for split in splits) for splits in samples]
        self.padding = _Padding(new, device)
        if self.padding.longest == 1:  # decoding: each new token sees itself and all before it
            self.rows = torch.arange(len(new), device=device)
            self.slots = lengths
            limit = lengths[:, None]
        else:
            _refuse_noise(samples)
            rules = [_token_rules(splits) for splits in samples]
            rows = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
            offset = torch.cat([torch.arange(n) for n in new])
            self.rows = rows.to(device)
            self.slots = lengths[self.rows] + offset.to(device)
            padded = torch.zeros(len(new), self.padding.longest, dtype=torch.long)
            for row, (last, _, _) in enumerate(rules):
                padded[row, : len(last)] = last
            limit = padded.to(device) + lengths[:, None]
        keys = torch.arange(extent, device=device)
        self.mask = (keys[None, None, :] <= limit[:, :, None])[:, None]  # (B, 1, L, S)
        self.extent = extent

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, E); k and v are cache views (B, K, S, E) that already hold the new tokens."""
        q = self.padding.pad(q).transpose(1, 2)
        return self.padding.unpad(_sdpa(q, k, v, self.bias(q.dtype)).transpose(1, 2))

    def _rebuilt(self, device: torch.device) -> "CachedPlan":
        return CachedPlan(self.samples, self.lengths.to(device), self.extent)
