"""Batched text generation over a ragged KV cache: prefill, decode loop, sampling, stops, image-skip
rounds.

A round is what the model writes between a fed `<|im_start|>` and the `<|im_end|>` it samples. A
text-only model may still ask for a picture: its round then ends in `<image_start>`. Such a row gets
no picture; `<|im_end|>` and `<|im_start|>` are fed and it writes on in a new round (an image skip).

Legend: B rows, N most tokens a row may sample, V vocab, n sampled tokens of a row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.bagel import Bagel, text_logits
from modeling.decoding import DecodeStep, Graphs, can_fuse
from modeling.kv_cache import KVCache, Store
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


@dataclass(frozen=True)
class Habits:
    """How the decoding loop treats a device."""

    look_every: int  # steps between two looks of the host at which rows have ended
    extent_step: int  # attention covers key slots up to a multiple of this
    all_widths: bool  # whether any number of rows may be left, or some numbers only
    records: bool = False  # whether steps are recorded as graphs

    def extent(self, slots: int) -> int:
        return -(-slots // self.extent_step) * self.extent_step

    def width(self, rows: int) -> int:
        """Rows to go on with where `rows` are left: up to 4, an even number up to 16, fours."""
        step = 1 if self.all_widths or rows <= 4 else 2 if rows <= 16 else 4
        return -(-rows // step) * step


# A look costs nothing on the CPU. On an accelerator it waits for the device, and each pair of
# extent and width is a graph to be recorded, or a shape to be compiled for.
CPU_HABITS = Habits(look_every=1, extent_step=1, all_widths=True)
ACCELERATOR_HABITS = Habits(look_every=16, extent_step=256, all_widths=False)
CUDA_HABITS = dataclasses.replace(ACCELERATOR_HABITS, records=True)


def _habits(model: Bagel) -> Habits:
    return {"cpu": CPU_HABITS, "cuda": CUDA_HABITS}.get(model.device.type, ACCELERATOR_HABITS)


class Workspace:
    """Memory that decoding keeps from one call of `generate` to the next: keys and values, the
    state of the rows and, on CUDA, the graphs recorded over both. It grows when a call needs more.
    """

    def __init__(self) -> None:
        self._start(None)

    def _start(self, store: Store | None) -> None:
        self.store = store
        self.state: _State | None = None
        self.step: DecodeStep | None = None
        self.graphs = Graphs()

    def cache(self, model: Bagel, rows: int, capacity: int) -> KVCache:
        """A cache over this memory, empty."""
        config, dtype, device = model.config.llm, model.dtype, model.device
        if self.store is None or not self.store.fits(config, rows, capacity, dtype, device):
            self._start(None)  # what there was is given back first
            cache = KVCache(config, rows, _habits(model).extent(capacity), dtype, device)
            self._start(Store(cache.keys, cache.values))
        return KVCache(config, rows, capacity, dtype, device, self.store)

    def decoder(self, model: Bagel) -> DecodeStep:
        """The decoding step over the memory of `cache`, with the current weights."""
        if self.step is None or not self.step.serves(model):
            self.graphs = Graphs()
            self.step = DecodeStep(model, self.store)
        else:
            self.step.refresh()
        return self.step


@torch.no_grad()
def generate(
    model: Bagel,
    contexts: Sequence[Sequence[Segment]],
    tokenizer: Tokenizer,
    params: SamplingParams,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    workspace: Workspace | None = None,
) -> list[Rollout]:
    """Write one completion per context, all rows as one ragged batch. Rows that have ended leave
    it.

    Args:
        contexts: per row its segments.
        seeds: per row the seed of its own random stream (required unless greedy): a row's
            completion does not depend on the rows it shares a batch with (but for rounding: of
            narrow dtypes that may now and then decide a token).
        budgets: per row a cap below `params.max_new_tokens`.
        workspace: memory to use again, of earlier calls for this model.
    """
    if not contexts:
        return []
    limits = budgets or [params.max_new_tokens] * len(contexts)
    room = decoding_room(model, params, max(limits))
    if not can_fuse(model):
        cache = open_cache(model, contexts, tokenizer.special, room)
        return decode(model, cache, tokenizer, params, seeds, budgets)
    workspace = workspace or Workspace()
    cache = workspace.cache(model, len(contexts), _longest(contexts) + room)
    extend(model, cache, contexts, tokenizer.special)
    return decode(model, cache, tokenizer, params, seeds, budgets, workspace=workspace)


def open_cache(
    model: Bagel, contexts: Sequence[Sequence[Segment]], tokens: SpecialTokens, room: int
) -> KVCache:
    """A cache that holds one context per row, with `room` slots behind the longest."""
    device = model.language_model.model.layer_devices or model.device
    capacity = _longest(contexts) + room
    cache = KVCache(model.config.llm, len(contexts), capacity, model.dtype, device)
    extend(model, cache, contexts, tokens)
    return cache


def _longest(contexts: Sequence[Sequence[Segment]]) -> int:
    return max(sum(map(segment_length, segments)) for segments in contexts)


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
    # content and closing tokens, an opening token per round, and the slot that rows which wait for
    # the host to look write again and again
    return limit + 2 * (params.max_image_skips + 1) + 1


@torch.no_grad()
def decode(
    model: Bagel,
    cache: KVCache,
    tokenizer: Tokenizer,
    params: SamplingParams,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    step: Callable[[], None] = lambda: None,
    workspace: Workspace | None = None,
) -> list[Rollout]:
    """`generate` for contexts that are in a cache already; what is written goes on in it.

    The cache needs `decoding_room`; `step` is called after each step. With the workspace that the
    cache came from, rows may change their places in it, so it is used up.
    """
    return _Decoder(model, cache, tokenizer, params, seeds, budgets, workspace).run(step)


@dataclass(frozen=True)
class _State:
    """Where the rows are, on the device; changed in place only. A row moves when others leave."""

    inputs: Tensor  # (B,) int64 token to be fed next
    lengths: Tensor  # (B,) int64 tokens in the cache
    positions: Tensor  # (B,) int64 rotary position of the next one
    active: Tensor  # (B,) bool still writing
    count: Tensor  # (B,) int64 sampled tokens
    content: Tensor  # (B,) int64 of these, visible ones
    limits: Tensor  # (B,) int64 that may be visible
    sampled: Tensor  # (B, N + 1) int64; what rows that wait write goes to the last column
    logprobs: Tensor  # (B, N + 1) float32
    uniforms: Tensor  # (B, N + 1) float64 in [0, 1), one for each token

    @classmethod
    def zeros(cls, rows: int, most: int, device: torch.device) -> "_State":
        def numbers(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        per_row = [numbers() for _ in range(3)], [numbers() for _ in range(3)]
        active = numbers(dtype=torch.bool)
        wide = [numbers(most + 1, dtype=t) for t in (torch.long, torch.float32, torch.float64)]
        return cls(*per_row[0], active, *per_row[1], *wide)

    def first(self, rows: int) -> "_State":
        """Views of the first rows."""
        return _State(*(getattr(self, field.name)[:rows] for field in dataclasses.fields(self)))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            tensor[targets] = tensor[sources]


class _Decoder:
    """The decode loop. The state of the rows lives on the device; the host looks at it every few
    steps, takes home what rows that have ended wrote, and lets the others close up.
    """

    def __init__(
        self,
        model: Bagel,
        cache: KVCache,
        tokenizer: Tokenizer,
        params: SamplingParams,
        seeds: Sequence[int] | None,
        budgets: Sequence[int] | None,
        workspace: Workspace | None = None,
    ) -> None:
        """Without a workspace the cache goes on to belong to the caller: its rows stay in place."""
        if params.temperature > 0 and seeds is None:
            raise ValueError("sampling needs a seed per row; pass seeds=[...] or temperature=0")
        B = len(cache)
        limits = [min(params.max_new_tokens, b) for b in budgets or [params.max_new_tokens] * B]
        if min(limits) < 1:
            raise ValueError(f"budgets must be at least 1, got {min(limits)}")
        self.model, self.cache, self.tokenizer, self.limits = model, cache, tokenizer, limits
        self.params, self.special = params, tokenizer.special
        self.habits = _habits(model)
        self.workspace = workspace
        self.fused = None
        if workspace:
            self.fused = workspace.decoder(model)
        elif can_fuse(model):
            self.fused = DecodeStep(model, Store(cache.keys, cache.values))
        # sampled tokens of a row, closing ones included
        self.most = max(limits) + params.max_image_skips + 1
        self.home = self._home(limits, seeds)
        self.state = self.home.first(B)  # of the rows that are left
        self.rows: list[int | None] = list(range(B))  # who is in a place of the batch
        self.skips = [0] * B
        self.seeds = seeds if seeds is not None else [None] * B
        self.done: list[Rollout | None] = [None] * B
        self.reach = cache.extent  # bound of the lengths
        self.ragged = True  # unless all rows that go on have as many tokens
        self.steps = 0

    def _home(self, limits: Sequence[int], seeds: Sequence[int] | None) -> _State:
        """The memory of all rows, which may have room for more, with their first state."""
        B, device = len(limits), self.cache.device
        state = self.workspace.state if self.workspace else None
        if state is None or len(state.inputs) < B or state.sampled.shape[1] <= self.most:
            state = _State.zeros(B, self.most, device)
            if self.workspace:
                self.workspace.state, self.workspace.graphs = state, Graphs()
        rows = state.first(B)
        rows.inputs.fill_(self.special.bos)
        rows.lengths.copy_(self.cache.lengths)
        rows.positions.copy_(self.cache.positions)
        rows.active.fill_(True)
        rows.count.zero_()
        rows.content.zero_()
        rows.limits.copy_(torch.tensor(limits))
        if self.params.temperature > 0:
            rows.uniforms[:, : self.most].copy_(self._uniforms(seeds))
        return state

    def _uniforms(self, seeds: Sequence[int]) -> Tensor:
        """(B, N) numbers in [0, 1), row r from the stream of seeds[r] alone."""
        rows = [
            torch.rand(
                self.most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            for seed in seeds
        ]
        return torch.stack(rows)

    def run(self, after_step: Callable[[], None]) -> list[Rollout]:
        """All rows to their end; `after_step` is called after each step."""
        with torch.inference_mode():  # what lasts was made before: it can be used anywhere
            while True:
                if self.steps % self.habits.look_every == 0:
                    self._look()
                    if not any(row is not None for row in self.rows):
                        break
                self._advance()
                self.steps += 1
                after_step()
        if self.workspace is None:
            self._return_cache()
        return self.done

    def _advance(self) -> None:
        """One step of all rows that are left, from a graph where one is to be had."""
        self.reach += 1
        width, extent = len(self.rows), self._extent(self.reach)
        if self.workspace is not None and self.habits.records:
            key = width, extent, self.params.temperature, self.special.eos
            self.workspace.graphs.run(key, lambda: self._step(extent))
        else:
            self._step(extent)

    def _extent(self, reach: int) -> int:
        return min(self.habits.extent(reach), self.cache.capacity)

    def _step(self, extent: int) -> None:
        """Feed one token per row, sample the next. Rows that wait neither advance nor record."""
        state = self.state
        logits = self._forward(state.inputs, extent).float()
        logprobs = torch.log_softmax(logits, dim=-1)
        place = torch.where(state.active, state.count, state.sampled.shape[1] - 1)[:, None]
        token = self._pick(logits, logprobs, place)
        state.sampled.scatter_(1, place, token)
        state.logprobs.scatter_(1, place, logprobs.gather(1, token))
        token = token[:, 0]
        for counter in (state.lengths, state.positions, state.count):
            counter.add_(state.active)
        state.active.logical_and_(token != self.special.eos)
        state.content.add_(state.active)
        state.active.logical_and_(state.content < state.limits)
        state.inputs.copy_(torch.where(state.active, token, state.inputs))

    def _forward(self, tokens: Tensor, extent: int) -> Tensor:
        """(B, V) logits of one more token per row, whose keys and values do not count yet."""
        state = self.state
        if self.fused is not None:
            return self.fused(tokens, state.positions, state.lengths, extent, self.ragged)
        cache = self.cache
        cache.lengths, cache.positions, cache.extent = state.lengths, state.positions, extent - 1
        return self.model(decode_batch(tokens, state.positions), kv_cache=cache, head=text_logits)

    def _pick(self, logits: Tensor, logprobs: Tensor, place: Tensor) -> Tensor:
        """(B, V) -> (B, 1): the largest, or the inverse of the cumulative distribution at the row's
        number.
        """
        tau = self.params.temperature
        if tau == 0:
            return logits.argmax(dim=-1, keepdim=True)
        probs = logprobs.exp() if tau == 1 else torch.softmax(logits / tau, dim=-1)
        cumulative = probs.double().cumsum(dim=-1)
        u = self.state.uniforms.gather(1, place)
        token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        return token.clamp_(max=logits.shape[-1] - 1)

    def _look(self) -> None:
        """Host side: which rows have ended, and which of them go on after an image skip."""
        state = self.state
        active, lengths = torch.stack([state.active.long(), state.lengths]).tolist()
        self.reach = max(lengths)
        living = {n for n, on in zip(lengths, active, strict=True) if on}
        # a graph is played at any length below its extent: it has to look at the lengths
        self.ragged = self.habits.extent_step > 1 or living != {self.reach}
        ended = [
            place for place, row in enumerate(self.rows) if row is not None and not active[place]
        ]
        if not ended:
            return
        skipping = []
        for place, rounds, content in self._written(ended):
            row = self.rows[place]
            if self._wants_skip(row, rounds, content):
                self.skips[row] += 1
                skipping.append(place)
            else:
                self.done[row] = Rollout(rounds, self.seeds[row])
                self.rows[place] = None
        if skipping:
            self._skip(skipping)
        if self.workspace is not None:
            self._close_up()

    def _written(self, places: list[int]) -> list[tuple[int, tuple[Round, ...], int]]:
        """(place, rounds, visible tokens) of rows that have ended, read in one go."""
        at = torch.tensor(places, device=self.cache.device)
        state = self.state
        numbers = torch.stack([state.count[at], state.content[at]]).tolist()
        longest = max(numbers[0])
        streams = state.sampled[at, :longest].tolist()
        logprobs = state.logprobs[at, :longest].tolist()
        return [
            (place, self._rounds(streams[i][:n], logprobs[i][:n]), content)
            for i, (place, n, content) in enumerate(zip(places, *numbers, strict=True))
        ]

    def _rounds(self, stream: list[int], logprobs: list[float]) -> tuple[Round, ...]:
        """Cut a sampled stream at its closing tokens."""
        rounds, start = [], 0
        for i, token in enumerate(stream):
            if token == self.special.eos:
                rounds.append(Round(tuple(stream[start:i]), "eos", tuple(logprobs[start : i + 1])))
                start = i + 1
        if start < len(stream):
            rounds.append(Round(tuple(stream[start:]), "budget", tuple(logprobs[start:])))
        return tuple(rounds)

    def _wants_skip(self, row: int, rounds: tuple[Round, ...], content: int) -> bool:
        """The round ended on a sampled closing token, asks for an image, and budget is left."""
        if self.skips[row] >= self.params.max_image_skips or rounds[-1].ended_by != "eos":
            return False
        if content >= self.limits[row]:
            return False
        return self.tokenizer.decode(rounds[-1].token_ids).rstrip().endswith(IMAGE_REQUEST)

    def _skip(self, places: list[int]) -> None:
        """Feed the closing token that these rows sampled, and let them open another round."""
        state = self.state
        skipping = torch.zeros_like(state.active)
        skipping[places] = True
        self.reach += 1
        self.ragged = True
        closing = torch.full_like(state.inputs, self.special.eos)
        self._forward(closing, self._extent(self.reach))
        state.lengths.add_(skipping)
        state.positions.add_(skipping)
        state.inputs.masked_fill_(skipping, self.special.bos)
        state.active.logical_or_(skipping)

    def _close_up(self) -> None:
        """Move rows that go on into the places of those that have ended, and drop the rest."""
        living = [place for place, row in enumerate(self.rows) if row is not None]
        width = min(self.habits.width(len(living)), len(self.rows))
        if width == len(self.rows):
            return
        free = [place for place in range(width) if self.rows[place] is None]
        late = [place for place in living if place >= width]
        if late:
            targets = free[: len(late)]
            device = self.cache.device
            moved = torch.tensor([late, targets], device=device)
            self.home.move(*moved)
            self.cache.move(*moved, self.reach)
            for source, target in zip(late, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[width:]
        self.state = self.home.first(width)

    def _return_cache(self) -> None:
        """Leave the cache as the caller expects it: with all that was written."""
        cache, state = self.cache, self.state
        cache.lengths, cache.positions, cache.extent = state.lengths, state.positions, self.reach
