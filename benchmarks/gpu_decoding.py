"""G1 to G4, G14, G16, G19, G20: decoding and sampling."""

import time
from collections.abc import Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measure, plain
from benchmarks.full_size import (
    ENDLESS,
    MACHINE,
    NEVER,
    SCALES,
    Scale,
    Settings,
    build,
    case,
    median_seconds,
    percent,
    student_prompt,
)
from benchmarks.gates import Check, Gate, at_least, at_most
from benchmarks.models import ragged_budgets
from modeling import generation
from modeling.bagel import Bagel, text_logits
from modeling.generation import Rollout, SamplingParams, Workspace, decode, decoding_room, extend
from modeling.kv_cache import KVCache
from modeling.sequence import decode_batch
from tests.tiny_model import TOKENS
from train import cost

# Of each width: gate, must and stretch of the ratio, stretch of the share of the floor.
FASTER = (("G1", 3.5, 5.0, 78), None, ("G2", 30, 60, 75), ("G3", 55, 100, 75))
GROWTH = ((1.15, 1.08), (1.3, 1.17), (1.55, 1.36))  # of all but the first, over it: must, stretch


class Decoding:
    """Rows of one context length, in a cache whose contents are random."""

    def __init__(self, model: Bagel, scale: Scale, rows: int, longest: int) -> None:
        self.model, self.rows, self.context = model, rows, scale.context
        self.workspace = Workspace()
        self.capacity = scale.context + decoding_room(model, SamplingParams(longest), longest)
        cache = self.workspace.cache(model, rows, self.capacity)
        for tensor in (cache.keys, cache.values):
            tensor.normal_()

    def cache(self) -> KVCache:
        cache = self.workspace.cache(self.model, self.rows, self.capacity)
        cache.lengths.fill_(self.context)
        cache.positions.fill_(self.context)
        cache.extent = self.context
        return cache

    def run(self, tokens: int) -> list[Rollout]:
        params = SamplingParams(tokens, temperature=0.0, max_image_skips=0)
        return decode(self.model, self.cache(), NEVER, params, workspace=self.workspace)

    def merged(self) -> tuple[plain.MergedCache, Tensor]:
        """The first row as the baseline has it, and the position that follows."""
        cache, layers = self.cache(), self.model.config.llm.num_hidden_layers
        other = plain.MergedCache(layers, cache.device)
        for layer in range(layers):
            for ours, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
                theirs[layer] = ours[layer, 0, :, : self.context].transpose(0, 1).contiguous()
        other.lengths = torch.full_like(other.lengths, self.context)
        other.places = torch.arange(self.context, device=cache.device)
        return other, torch.full((1,), self.context, device=cache.device)

    def replay(self) -> Check:
        """The fused step against the model's own forward, log-probs of all tokens."""
        cache, device = self.cache(), self.model.device
        tokens = torch.arange(16, 16 + self.rows, device=device)
        with torch.no_grad():
            expected = self.model(decode_batch(tokens, cache.positions), cache, text_logits)
            step = self.workspace.decoder(self.model)
            logits = step(tokens, cache.positions, cache.lengths, self.context + 1)
        apart = (expected.float().log_softmax(-1) - logits.float().log_softmax(-1)).abs()
        return Check("log-probs of a step against the model's forward", float(apart.mean()), 0.02)


def decode_part(settings: Settings) -> list[Gate]:
    """Decoding: time per token, growth with rows and length, what compiling costs."""
    scale = SCALES[settings.scale]
    model = build(scale.config, settings.device, settings.dtype, whole=False)
    per_step, gates = {}, []
    for rows, faster in zip(scale.widths, FASTER, strict=True):
        work = Decoding(model, scale, rows, scale.steps)
        start = time.perf_counter()
        work.run(scale.steps)
        first = time.perf_counter() - start
        merged, position = work.merged()
        timing = measure.paired(
            lambda merged=merged, position=position: partial(
                plain.decode, model, merged.fork(), position, ENDLESS, scale.steps
            ),
            lambda work=work: partial(work.run, scale.steps),
            settings.repeats,
            warmup=2,
            device=settings.device,
        )
        per_step[rows] = timing.ours_s / scale.steps
        floor = cost.decode_step(scale.config, rows, scale.context).seconds(MACHINE)
        if rows == 1:
            gates += _compiling(work, first, timing, scale, settings)
        if faster is not None:
            name, must, stretch, share = faster
            gates.append(
                at_least(
                    name,
                    f"tokens/s of {rows} rows against one plain row, context {scale.context}",
                    timing.ratio * rows,
                    "x",
                    must,
                    stretch,
                    checks=(work.replay(),),
                    spread=f"{timing.low * rows:.3g}..{timing.high * rows:.3g}",
                    floor_percent=percent(floor, per_step[rows]),
                    detail={"plain_ms": 1e3 * timing.baseline_s / scale.steps}
                    | {"ours_ms": 1e3 * per_step[rows], "floor_ms": 1e3 * floor},
                )
            )
            what = f"share of the floor of a decoding step, {rows} rows"
            reached = percent(floor, per_step[rows])
            gates.append(at_least(f"{name}-floor", what, reached, "%", 60, share))
        del work
    for rows, (must, stretch) in zip(scale.widths[1:], GROWTH, strict=True):
        what, growth = f"time of a decoding step, {rows} rows over 1", per_step[rows] / per_step[1]
        gates.append(at_most("G16", what, growth, "x", must, stretch))
    rows, (short, long) = scale.widths[-2], scale.growth
    work = Decoding(model, scale, rows, long)
    times = [median_seconds(partial(work.run, n), settings, warmup=2) for n in (short, long)]
    gates.append(
        at_most(
            "G14", f"sampling time, {long} over {short} tokens", times[1] / times[0], "x", 4.3, 4
        )
    )
    return gates


def _compiling(
    work: Decoding, first: float, timing: measure.Paired, scale: Scale, settings: Settings
) -> list[Gate]:
    """What the first call costs beyond a later one, and after how much decoding that is repaid:
    against the same steps launched one operator at a time.
    """
    with mock.patch.object(generation.Graphs, "run", lambda self, key, step: step()):
        eager = median_seconds(partial(work.run, scale.steps), settings, warmup=1)
    spent = first - timing.ours_s
    saved = max((eager - timing.ours_s) / scale.steps, 1e-9) * scale.completion
    return [
        at_most("G20", "compiling and recording a decoding step", spent, "s", 180, 60),
        at_most("G20", "completions until that is repaid", spent / saved, "", 30 * 16, 30),
    ]


def sampling_part(settings: Settings) -> list[Gate]:
    """Sampling of 16 mixed prompts, encoder and prefill included; the latency of one answer."""
    scale = SCALES[settings.scale]
    model = build(scale.config, settings.device, settings.dtype, whole=False)
    prompts = [student_prompt(scale, i % 3, i) for i in range(16)]
    budgets = ragged_budgets(16, scale.completion, scale.cap, seed=3)
    workspace = Workspace()

    def ours(rows: slice = slice(None), own: Sequence[int] = budgets) -> list:
        contexts, limits = prompts[rows], list(own[rows])
        params = SamplingParams(max(limits), max_image_skips=0)
        room = decoding_room(model, params, max(limits))
        longest = max(sum(map(generation.segment_length, c)) for c in contexts)
        cache = workspace.cache(model, len(contexts), longest + room)
        extend(model, cache, contexts, TOKENS)
        seeds = list(range(len(contexts)))
        return decode(model, cache, NEVER, params, seeds, limits, workspace=workspace)

    some = slice(0, scale.plain_rows)
    share = sum(budgets) / sum(budgets[some])

    def baseline() -> None:
        seeds = list(range(scale.plain_rows))
        plain.generate(model, prompts[some], TOKENS, budgets[some], 1.0, seeds, eos=-1)

    rollouts = ours()
    wrong = sum(len(r.token_ids) != b for r, b in zip(rollouts, budgets, strict=True))
    timing = measure.paired(
        lambda: baseline, lambda: ours, max(2, settings.repeats // 2), device=settings.device
    )
    floor = _sampling_floor(scale, budgets)
    answer = [scale.answers[1]] * 16
    one = median_seconds(lambda: ours(slice(1, 2), answer), settings)
    single = _sampling_floor(scale, answer[:1], sizes=(1,))
    return [
        at_least(
            "G4",
            "sampling of 16 mixed prompts, plain loop / ours",
            timing.ratio * share,
            "x",
            12,
            25,
            checks=(Check("completions of another length than asked for", wrong, 0),),
            spread=f"{timing.low * share:.3g}..{timing.high * share:.3g}",
            floor_percent=percent(floor, timing.ours_s),
            detail={"ours_s": timing.ours_s, "plain_s": timing.baseline_s * share}
            | {"plain_rows": scale.plain_rows},
        ),
        at_most(
            "G19",
            f"latency of a text-only answer of {answer[0]} tokens",
            one,
            "s",
            1.3,
            0.95,
            floor_percent=percent(single, one),
        ),
    ]


def _sampling_floor(
    scale: Scale, budgets: Sequence[int], sizes: Sequence[int] = (0, 1, 2)
) -> float:
    """Encoder and prefill of each prompt, then steps over the rows that are left."""
    total = 0.0
    for row in range(len(budgets)):
        one = case(scale, size=sizes[row % len(sizes)])
        total += cost.vision(scale.config, [one.image]).seconds(MACHINE)
        total += cost.prefill(scale.config, one).seconds(MACHINE)
    context = cost.length(case(scale, size=sizes[len(sizes) // 2]).prompt())
    for step in range(max(budgets)):
        rows = sum(budget > step for budget in budgets)
        total += cost.decode_step(scale.config, rows, context + step).seconds(MACHINE)
    return total
