"""Batched text generation over a ragged KV cache: prefill, decode loop, sampling, stops, image-skip
rounds.

A round is what the model writes between a fed `<|im_start|>` and the `<|im_end|>` it samples. A
text-only model may still ask for a picture: its round then ends in `<image_start>`. Such a row gets
no picture; `<|im_end|>` and `<|im_start|>` are fed and it writes on in a new round (an image skip).

Legend: B rows, V vocab, n sampled tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.bagel import Bagel, text_logits
from modeling.kv_cache import KVCache
from modeling.sequence import Segment, decode_batch, pack, segment_length
from modeling.tokenizer import SpecialTokens, Tokenizer

IMAGE_REQUEST = "<image_start>"


@dataclass(frozen=True)
class SamplingParams:
    """max_new_tokens counts visible tokens over all rounds; temperature 0 is greedy."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    max_image_skips: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0 (0 = greedy), got {self.temperature}")


@dataclass(frozen=True)
class Round:
    """Content ids of one round; framing tokens are not part of it."""

    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "budget"]
    logprobs: tuple[float, ...]  # of each id, then of the closing token if it was sampled


@dataclass(frozen=True)
class Rollout:
    """What one row wrote. Log-probs are those of the model at temperature 1."""

    rounds: tuple[Round, ...]
    seed: int | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for r in self.rounds for token in r.token_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of every sampled token, closing tokens included, in the order of the loss rows."""
        return tuple(value for r in self.rounds for value in r.logprobs)

    @property
    def skips(self) -> int:
        return len(self.rounds) - 1

    @property
    def ended_by(self) -> str:
        return self.rounds[-1].ended_by


@torch.no_grad()
def generate(
    model: Bagel,
    contexts: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    params: SamplingParams,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
) -> list[Rollout]:
    """Write one completion per context, all rows as one ragged batch.

    Args:
        contexts: per row its segments.
        seeds: per row the seed of its own random stream (required unless greedy): a row's
            completion does not depend on the rows it shares a batch with.
        budgets: per row a cap below `params.max_new_tokens`.
    """
    if not contexts:
        return []
    limits = budgets or [params.max_new_tokens] * len(contexts)
    room = decoding_room(model, params, max(limits))
    cache = open_cache(model, contexts, tokenizer.special, room)
    return decode(model, cache, tokenizer, params, seeds, budgets)


def open_cache(
    model: Bagel, contexts: Sequence[Sequence[Segment]], tokens: SpecialTokens, room: int
) -> KVCache:
    """A cache that holds one context per row, with `room` slots behind the longest."""
    device = model.language_model.model.layer_devices or model.device
    capacity = max(sum(map(segment_length, segments)) for segments in contexts) + room
    cache = KVCache(model.config.llm, len(contexts), capacity, model.dtype, device)
    extend(model, cache, contexts, tokens)
    return cache


@torch.no_grad()
def extend(
    model: Bagel, cache: KVCache, contexts: Sequence[Sequence[Segment]], tokens: SpecialTokens
) -> None:
    """Append to every row of the cache its segments (possibly none), in one forward."""
    batch = pack(contexts, tokens)
    if not len(batch):
        return
    batch = batch.to(cache.device).after(cache.positions)
    model(batch, kv_cache=cache)
    following = torch.tensor(batch.next_positions, device=cache.device)
    lengths = torch.tensor(batch.sample_lens, device=cache.device)
    cache.advance(lengths, cache.positions + following, max(batch.sample_lens))


def decoding_room(model: Bagel, params: SamplingParams, limit: int) -> int:
    """Slots that decoding up to `limit` visible tokens per row may write behind a context."""
    # content and closing tokens, an opening token per round, and the slots that may be written by
    # rows that wait for the host to look
    return limit + 2 * (params.max_image_skips + 1) + _look_every(model) + 1


def _look_every(model: Bagel) -> int:
    # a look costs a device synchronisation on an accelerator and nothing on the CPU
    return 1 if model.device.type == "cpu" else 16


@torch.no_grad()
def decode(
    model: Bagel,
    cache: KVCache,
    tokenizer: Tokenizer,
    params: SamplingParams,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """`generate` for contexts that are in a cache already; what is written goes on in it.

    The cache needs `decoding_room`; `step` is called after each step.
    """
    if params.temperature > 0 and seeds is None:
        raise ValueError("sampling needs a seed per row; pass seeds=[...] or temperature=0")
    limits = [
        min(params.max_new_tokens, b) for b in budgets or [params.max_new_tokens] * len(cache)
    ]
    if min(limits) < 1:
        raise ValueError(f"budgets must be at least 1, got {min(limits)}")
    state = _Decoder(model, cache, tokenizer, params, seeds, limits)
    while state.running():
        state.step()
        step()
    return state.rollouts()


class _Decoder:
    """The decode loop. Per-row state lives on the device; the host looks at it every few steps."""

    def __init__(
        self,
        model: Bagel,
        cache: KVCache,
        tokenizer: Tokenizer,
        params: SamplingParams,
        seeds: Sequence[int] | None,
        limits: Sequence[int],
    ) -> None:
        self.model, self.tokenizer, self.params, self.seeds = model, tokenizer, params, seeds
        device, B = cache.device, len(cache)
        self.look_every = _look_every(model)
        # sampled tokens of a row, closing ones included
        self.most = max(limits) + params.max_image_skips + 1
        self.cache = cache
        self.special = tokenizer.special
        self.limits = torch.tensor(limits, device=device)
        self.sampled = torch.zeros(B, self.most, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B, self.most, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)  # sampled tokens
        self.content = torch.zeros(B, dtype=torch.long, device=device)  # of these, visible ones
        self.inputs = torch.full((B,), self.special.bos, device=device)
        self.active = torch.ones(B, dtype=torch.bool, device=device)
        self.uniforms = None if params.temperature == 0 else self._uniforms(device)
        self.finished = [False] * B
        self.skips = [0] * B
        self.steps = 0

    def _uniforms(self, device: torch.device) -> Tensor:
        """(B, most) numbers in [0, 1), row r from the stream of seeds[r] alone."""
        rows = [
            torch.rand(
                self.most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            for seed in self.seeds
        ]
        return torch.stack(rows).to(device)

    def running(self) -> bool:
        """False once every row has ended; looks at the device only every `look_every` steps."""
        if self.steps % self.look_every == 0:
            self._look()
        return not all(self.finished)

    def step(self) -> None:
        """Feed one token per row, sample the next. Rows that wait neither advance nor record."""
        logits = self._feed(self.inputs, self.active)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        token = self._pick(logits)
        slot = self.count.clamp(max=self.most - 1)[:, None]
        self._record(self.sampled, slot, token)
        self._record(self.logprobs, slot, logprobs.gather(1, token[:, None])[:, 0])
        is_eos = token == self.special.eos
        self.count = self.count + self.active
        self.content = self.content + (self.active & ~is_eos)
        self.active = self.active & ~is_eos & (self.content < self.limits)
        self.inputs = torch.where(self.active, token, self.inputs)
        self.steps += 1

    def _feed(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Run one token per row; only rows in `keep` remember it. Returns (B, V) logits."""
        positions = self.cache.positions
        batch = decode_batch(tokens, positions)
        logits = self.model(batch, kv_cache=self.cache, head=text_logits)
        self.cache.advance(keep.long(), positions + keep, 1)
        return logits

    def _record(self, buffer: Tensor, slot: Tensor, values: Tensor) -> None:
        old = buffer.gather(1, slot)[:, 0]
        buffer.scatter_(1, slot, torch.where(self.active, values, old)[:, None])

    def _pick(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,): argmax, or the inverse of the cumulative distribution at the row's
        number.
        """
        if self.uniforms is None:
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits.float() / self.params.temperature, dim=-1)
        cumulative = probs.double().cumsum(dim=-1)
        u = self.uniforms.gather(1, self.count.clamp(max=self.most - 1)[:, None])
        token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        return token[:, 0].clamp(max=logits.shape[-1] - 1)

    def _look(self) -> None:
        """Host side: which rows have ended, and which of them go on after an image skip."""
        self.cache.extent = int(self.cache.lengths.max())
        active = self.active.tolist()
        ended = [r for r, on in enumerate(active) if not on and not self.finished[r]]
        if not ended:
            return
        skipping = torch.zeros_like(self.active)
        for row in ended:
            if self._wants_skip(row):
                self.skips[row] += 1
                skipping[row] = True
            else:
                self.finished[row] = True
        if skipping.any():
            eos = torch.full_like(self.inputs, self.special.eos)
            self._feed(eos, skipping)
            self.inputs = torch.where(skipping, self.special.bos, self.inputs)
            self.active = self.active | skipping

    def _wants_skip(self, row: int) -> bool:
        """The round ended on a sampled closing token, asks for an image, and budget is left."""
        if self.skips[row] >= self.params.max_image_skips:
            return False
        rounds = self._rounds(row)
        if rounds[-1].ended_by != "eos" or int(self.content[row]) >= int(self.limits[row]):
            return False
        return self.tokenizer.decode(rounds[-1].token_ids).rstrip().endswith(IMAGE_REQUEST)

    def _rounds(self, row: int) -> tuple[Round, ...]:
        """Cut the row's sampled stream at its closing tokens."""
        n = int(self.count[row])
        stream, logprobs = self.sampled[row, :n].tolist(), self.logprobs[row, :n].tolist()
        rounds, start = [], 0
        for i, token in enumerate(stream):
            if token == self.special.eos:
                rounds.append(Round(tuple(stream[start:i]), "eos", tuple(logprobs[start : i + 1])))
                start = i + 1
        if start < n:
            rounds.append(Round(tuple(stream[start:]), "budget", tuple(logprobs[start:])))
        return tuple(rounds)

    def rollouts(self) -> list[Rollout]:
        seeds = self.seeds if self.seeds is not None else [None] * len(self.finished)
        return [Rollout(self._rounds(row), seed) for row, seed in enumerate(seeds)]
