"""C1 to C4 and C10: decoding."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import measure, plain
from benchmarks.gates import Check, Gate, Settings, at_least, at_most
from benchmarks.models import (
    CONTEXT,
    DECODING_DTYPE,
    TOKENIZER,
    accelerator_habits,
    decode_floor,
    mismatches,
    models,
    prompt,
    ragged_budgets,
)
from modeling import generation
from modeling.bagel import Bagel
from modeling.generation import SamplingParams, decode, decoding_room, generate, open_cache
from modeling.sequence import Segment, segment_length
from tests.tiny_model import TOKENS


class Decoding:
    """Greedy decoding of one row by the baseline, of `rows` equal rows by ours."""

    def __init__(self, size: str, rows: int, new: int, dtype: torch.dtype) -> None:
        self.whole, self.ours = models(size, dtype)
        self.rows, self.new = rows, new
        context, self.params = prompt(CONTEXT[size]), SamplingParams(new, temperature=0.0)
        self.merged, self.position = plain.prefill(self.whole, context, TOKENS)
        room = decoding_room(self.ours, self.params, new)
        self.single = open_cache(self.ours, [context], TOKENS, room)

    def baseline(self) -> Callable[[], list[int]]:
        cache = self.merged.fork()
        return lambda: plain.decode(self.whole, cache, self.position, TOKENS, self.new)

    def batched(self) -> Callable[[], list[generation.Rollout]]:
        cache = self.single.select([0] * self.rows)
        return lambda: decode(self.ours, cache, TOKENIZER, self.params)

    def check(self) -> Check:
        expected, found = self.baseline()(), self.batched()()
        wrong = sum(mismatches(expected, row.token_ids) for row in found)
        return Check(f"greedy tokens in float32, {self.rows} rows", wrong, 0)


def _decoding_gate(
    gate_id: str, size: str, rows: int, bounds: tuple[float, float], settings: Settings
) -> Gate:
    new, floor = 32, None
    check = Decoding(size, rows, 24, torch.float32).check()
    work = Decoding(size, rows, new, DECODING_DTYPE)
    timing = measure.paired(work.baseline, work.batched, settings.repeats)
    if size == "small":
        step = decode_floor(work.ours, rows, CONTEXT[size] + new)
        floor = 100 * step * new / timing.ours_s
    return at_least(
        gate_id,
        f"decoding, tokens/s over plain, {size}, {rows} row{'s' * (rows > 1)}",
        timing.ratio * rows,
        "x",
        *bounds,
        checks=(check,),
        spread=f"{timing.low * rows:.3g}..{timing.high * rows:.3g}",
        floor_percent=floor,
        detail={
            "plain_ms_per_token": 1e3 * timing.baseline_s / new,
            "ours_ms_per_step": 1e3 * timing.ours_s / new,
            "repeats": timing.repeats,
        },
    )


def c1(settings: Settings) -> list[Gate]:
    """Speed of decoding one row."""
    return [_decoding_gate("C1", "small", 1, (1.5, 3), settings)]


def c2(settings: Settings) -> list[Gate]:
    """Speed of decoding many rows."""
    bounds = {8: (5, 12), 16: (8, 20)}
    return [
        _decoding_gate("C2", size, rows, bounds[rows], settings)
        for size in ("tiny", "small")
        for rows in bounds
    ]


def c3(settings: Settings) -> list[Gate]:
    """Whether a token costs more the later it comes."""
    whole, ours = models("tiny")
    context, (short, long) = prompt(256), (64, 512)
    written: dict[int, tuple[int, ...]] = {}

    def writing(new: int) -> Callable[[], measure.Work]:
        params = SamplingParams(new, temperature=0.0)

        def setup() -> measure.Work:
            cache = open_cache(ours, [context], TOKENS, decoding_room(ours, params, new))
            return lambda: written.update(
                {new: decode(ours, cache, TOKENIZER, params)[0].token_ids}
            )

        return setup

    timing = measure.paired(writing(long), writing(short), settings.repeats)
    scale = short / long
    wrong = mismatches(written[long], plain.generate(whole, [context], TOKENS, [long])[0])
    return [
        at_most(
            "C3",
            "time per token over 512 tokens / over 64, one row, tiny",
            timing.ratio * scale,
            "x",
            1.3,
            1.1,
            checks=(Check("greedy tokens", wrong, 0),),
            spread=f"{timing.low * scale:.3g}..{timing.high * scale:.3g}",
            detail={"us_per_token_at_64": 1e6 * timing.ours_s / short},
        )
    ]


def row_tokens(model: Bagel, contexts: list[list[Segment]], budgets: list[int]) -> tuple[int, list]:
    """Tokens that `generate` computes for all rows after prompts of text, and what it wrote."""
    params = SamplingParams(max(budgets), temperature=0.0)
    with measure.counting(model.language_model.model.embed_tokens.weight) as counts:
        written = generate(model, contexts, TOKENIZER, params, budgets=budgets)
    prompts = sum(segment_length(segment) for context in contexts for segment in context)
    return counts.row_tokens - prompts, written


def ragged_share(mean: float, cap: int, draws_: int, rows: int = 16) -> tuple[float, list[Check]]:
    """Useful sampled tokens / computed row-tokens over some batches of ragged lengths."""
    whole, ours = models("tiny")
    useful = computed = 0
    checks = []
    for seed in range(draws_):
        budgets = ragged_budgets(rows, mean, cap, seed)
        contexts = [prompt(24 + row, seed=row) for row in range(rows)]
        count, written = row_tokens(ours, contexts, budgets)
        useful, computed = useful + sum(budgets), computed + count
        wrong = sum(abs(len(r.token_ids) - b) for r, b in zip(written, budgets, strict=True))
        checks.append(Check("lengths are the budgets", wrong, 0))
        shortest = budgets.index(min(budgets))
        alone = plain.generate(whole, [contexts[shortest]], TOKENS, [budgets[shortest]])[0]
        wrong = mismatches(alone, written[shortest].token_ids)
        checks.append(Check("greedy tokens of the shortest row", wrong, 0))
    return useful / computed, checks


def c4(settings: Settings) -> list[Gate]:
    """How much of what a ragged batch computes is of use."""
    here, checks = ragged_share(mean=48, cap=128, draws_=3)
    with accelerator_habits():
        there, more_checks = ragged_share(mean=384, cap=1024, draws_=2)
    what = "sampled / computed tokens, 16 ragged rows"
    return [
        at_least("C4", f"{what}, mean 48", here, "", 0.75, 0.9, tuple(checks)),
        at_least(
            "C4",
            f"{what}, mean 384, habits of an accelerator",
            there,
            "",
            0.75,
            0.9,
            tuple(more_checks),
        ),
    ]


def per_step(run: Callable[[int], Any], first: int, second: int) -> SimpleNamespace:
    """Counts per step: those of `second` steps less those of `first`, so that what comes before
    the first step falls out.
    """
    counts = []
    for steps in (first, second):
        with measure.counting() as found:
            run(steps)
        counts.append(found)
    rest, steps = counts[1].minus(counts[0]), second - first
    names = ("dispatches", "non_view", "syncs", "scalars")
    return SimpleNamespace(**{name: getattr(rest, name) / steps for name in names})


def decoded_step(model: Bagel, rows: int) -> SimpleNamespace:
    """Counts of a decoding step of `generate`, with the habits of an accelerator."""
    contexts = [prompt(CONTEXT["deep"])] * rows
    look = generation.ACCELERATOR_HABITS.look_every

    def run(steps: int) -> None:
        generate(model, contexts, TOKENIZER, SamplingParams(steps, temperature=0.0))

    with accelerator_habits():
        return per_step(run, look, 3 * look)


def c10(settings: Settings) -> list[Gate]:
    """Operators and waits of the host in a decoded token, 28 layers, bfloat16."""
    context = [prompt(CONTEXT["deep"])]
    whole, ours = models("deep")
    greedy = generate(ours, context, TOKENIZER, SamplingParams(24, 0.0))[0].token_ids
    wrong = mismatches(greedy, plain.generate(whole, context, TOKENS, [24])[0])
    wide = decoded_step(ours, 1)
    whole, ours = models("deep", torch.bfloat16)
    found, sixteen = decoded_step(ours, 1), decoded_step(ours, 16)
    baseline = per_step(lambda n: plain.generate(whole, context, TOKENS, [n]), 4, 12)
    check = (Check("greedy tokens in float32", wrong, 0),)
    detail = {
        "plain": vars(baseline),
        "ours": vars(found),
        "ours_16_rows": vars(sixteen),
        "ours_float32": vars(wide),
    }
    what = "per decoded token, 28 layers, bfloat16, habits of an accelerator"
    operators, waits = found.dispatches, found.syncs
    return [
        at_most("C10", f"operators {what}", operators, "", 900, 500, check, detail=detail),
        at_most("C10", f"host waits {what}", waits, "", 1 / 8, 0, check, detail=detail),
    ]
