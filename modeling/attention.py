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

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modeling.sequence import Split

Backend = Literal["sdpa", "flex", "flash"]
Samples = Sequence[Sequence[Split]]


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


def packed_plan(samples: Samples, device: torch.device | str, backend: Backend = "sdpa") -> Plan:
    """Attention among the tokens of a packed sequence: q (T, H, E), k and v (T, K, E)."""
    if backend == "sdpa":
        return SDPAPlan(samples, device)
    if backend == "flex":
        return FlexPlan(samples, device)
    if backend == "flash":
        return FlashPlan(samples)
    raise ValueError(f"attention backend {backend!r} is unknown: choose sdpa, flex or flash")


def split_mask(splits: Sequence[Split]) -> Tensor:
    """Dense (L, L) bool mask of one sample, True = may attend: the definition of all plans."""
    limit, block, noise = _token_rules(splits)
    keys = torch.arange(len(limit))
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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, E) x (B, K, S, E) -> (B, H, L, E), scale 1/sqrt(E), grouped kv-heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class SDPAPlan(Plan):
    """Pads samples to one length and masks; exact for every mix of splits."""

    def __init__(self, samples: Samples, device: torch.device | str) -> None:
        super().__init__(device)
        self.samples = samples
        lengths = [sum(split.length for split in splits) for splits in samples]
        self.padding = _Padding(lengths, device)
        all_full = all(len(splits) == 1 and splits[0].mode != "causal" for splits in samples)
        if all_full and self.padding.uniform:
            self.mask = None
        else:
            self.mask = _padded_mask(samples, self.padding.longest, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.padding.pad(x).transpose(1, 2) for x in (q, k, v))
        out = _sdpa(q, k, v, self.mask).transpose(1, 2)  # (B, L, H, E)
        return self.padding.unpad(out)

    def _rebuilt(self, device: torch.device) -> "SDPAPlan":
        return SDPAPlan(self.samples, device)


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
    """FlexAttention over the packed sequence: no padding, mask blocks built from the splits."""

    def __init__(self, samples: Samples, device: torch.device | str) -> None:
        super().__init__(device)
        self.samples = samples
        limits, blocks, noises, owners, start = [], [], [], [], 0
        for row, splits in enumerate(samples):
            limit, block, noise = _token_rules(splits)
            limits.append(limit + start)
            blocks.append(block)
            noises.append(noise)
            owners.append(torch.full_like(limit, row))
            start += len(limit)
        limit, block = torch.cat(limits).to(device), torch.cat(blocks).to(device)
        noise, owner = torch.cat(noises).to(device), torch.cat(owners).to(device)

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_sample = owner[query] == owner[key]
            own_split = block[query] == block[key]
            return same_sample & (key <= limit[query]) & (~noise[key] | own_split)

        self.block_mask = create_block_mask(visible, None, None, start, start, device=str(device))
        # compiled on CUDA only: the eager kernel is the reference, and all that CPU tests need
        self.kernel = torch.compile(flex_attention) if "cuda" in str(device) else flex_attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, E)
        grouped = q.shape[1] != k.shape[1]
        out = self.kernel(q, k, v, block_mask=self.block_mask, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    def _rebuilt(self, device: torch.device) -> "FlexPlan":
        return FlexPlan(self.samples, device)


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


class CachedPlan(Plan):
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
            rules = [_token_rules(splits) for splits in samples]
            if any(bool(noise.any()) for _, _, noise in rules):
                raise ValueError("noise splits cannot be cached")
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
        return self.padding.unpad(_sdpa(q, k, v, self.mask).transpose(1, 2))

    def _rebuilt(self, device: torch.device) -> "CachedPlan":
        return CachedPlan(self.samples, self.lengths.to(device), self.extent)
