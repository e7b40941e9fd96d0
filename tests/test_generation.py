"""Generation: cached logits equal packed ones, sampling, rounds, skips and budgets."""

import dataclasses
from collections import Counter

import pytest
import torch

from modeling import generation
from modeling.bagel import text_logits
from modeling.generation import SamplingParams, generate
from modeling.kv_cache import KVCache
from modeling.sequence import Text, decode_batch, pack
from tests.tiny_model import TOKENS, FakeTokenizer, random_image, tiny_bagel

TOLERANCE = 5e-5  # float32
REQUEST = 300  # decodes to <image_start> in these tests


class SkippingTokenizer(FakeTokenizer):
    """One id asks for an image, one is a trailing line break."""

    def decode(self, token_ids):
        return "".join(
            {REQUEST: "<image_start>", 26: "\n"}.get(i)
            or super(SkippingTokenizer, self).decode([i])
            for i in token_ids
        )


def student(seed=0, words="what is it?"):
    ids = FakeTokenizer().encode
    return [Text(tuple(ids("sys"))), random_image(3, 2, seed), Text(tuple(ids(words)))]


def teacher(seed=0, words="what is it?"):
    thoughts = [random_image(2, 2, seed + 10), random_image(1, 4, seed + 11)]
    return [*student(seed, words), Text((40, 41, 42)), *thoughts, Text((50, 51))]


CONTEXTS = {
    "student": [student()],
    "teacher": [teacher()],
    "ragged": [
        student(),
        teacher(1),
        student(2, "a longer question, of more words"),
        teacher(3, ""),
    ],
}
ROUNDS = {
    "one_round": [((60, 61, 62, 63, 64),), ((70,),), ((80, 81, 82),), ((),)],
    "skip": [((60, 61), (62, 63)), ((70,), (71, 72, 73, 74)), ((), (80,)), ((90, 91, 92), ())],
}


def packed_rows(model, context, rounds):
    """(R, V) logits of all loss rows of one row, and the labels."""
    batch = pack([[*context, *(Text(tuple(ids), loss=True) for ids in rounds)]], TOKENS)
    return model(batch, head=text_logits), batch.labels


@torch.no_grad()
def cached_rows(model, contexts, rounds):
    """The same logits from one ragged cache, one token per step and row."""
    prefix = pack(contexts, TOKENS)
    lens = prefix.sample_lens
    streams, wanted = [], []
    for row in rounds:
        stream = [t for ids in row for t in (TOKENS.bos, *ids, TOKENS.eos)][:-1]
        closing = {i for i, token in enumerate(stream) if token == TOKENS.eos}
        streams.append(stream)
        wanted.append([i for i in range(len(stream)) if i not in closing])
    longest = max(map(len, streams))
    cache = KVCache(model.config.llm, len(contexts), max(lens) + longest)
    model(prefix, kv_cache=cache)
    cache.advance(torch.tensor(lens), torch.tensor(prefix.next_positions), max(lens))
    steps = []
    for i in range(longest):
        tokens = torch.tensor([s[i] if i < len(s) else 7 for s in streams])
        keep = torch.tensor([i < len(s) for s in streams])
        steps.append(model(decode_batch(tokens, cache.positions), cache, text_logits))
        cache.advance(keep.long(), cache.positions + keep, 1)
        cache.extent = int(cache.lengths.max())
    logits = torch.stack(steps, dim=1)  # (B, steps, V)
    return [logits[row, rows] for row, rows in enumerate(wanted)]


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("contexts", CONTEXTS)
def test_packed_logits_equal_cached_logits(shared_bagel, contexts, rounds):
    contexts = CONTEXTS[contexts]
    rounds = ROUNDS[rounds][: len(contexts)]
    cached = cached_rows(shared_bagel, contexts, rounds)
    for context, row, ours in zip(contexts, rounds, cached, strict=True):
        packed, _ = packed_rows(shared_bagel, context, row)
        assert packed.abs().max() > 1.0  # logits that could show an error
        torch.testing.assert_close(ours, packed, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_packed_logits_do_not_depend_on_the_pack(shared_bagel, backend, monkeypatch):
    """Samples of one pack do not see each other, whichever backend computes it."""
    monkeypatch.setattr(shared_bagel, "attention_backend", backend)
    contexts = CONTEXTS["ragged"]
    segments = [[*context, Text((60, 61), loss=True)] for context in contexts]
    together = shared_bagel(pack(segments, TOKENS), head=text_logits)
    monkeypatch.setattr(shared_bagel, "attention_backend", "sdpa")
    alone = [shared_bagel(pack([row], TOKENS), head=text_logits) for row in segments]
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_images_and_their_order_matter(shared_bagel):
    base, _ = packed_rows(shared_bagel, teacher(), [(60, 61)])
    other = teacher()
    other[1] = random_image(3, 2, seed=99)
    changed, _ = packed_rows(shared_bagel, other, [(60, 61)])
    assert (changed - base).abs().amax(dim=1).min() > 1e-2
    swapped = teacher()
    swapped[4], swapped[5] = swapped[5], swapped[4]
    changed, _ = packed_rows(shared_bagel, swapped, [(60, 61)])
    assert (changed - base).abs().amax(dim=1).min() > 1e-3


# ---- rollouts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restless():
    """A model that often closes a round and often asks for a picture: every path is taken."""
    model = tiny_bagel(seed=5).requires_grad_(False)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(6))
    model.language_model.model.embed_tokens.weight += 2 * direction
    rows = [Text(tuple(range(60, 100)), loss=True)]
    batch = pack([[*student(), *rows], [*teacher(), *rows]], TOKENS)
    mean = model(batch).mean(0)
    head = model.language_model.lm_head.weight
    head *= 0.2
    for token, level in ((REQUEST, 7.0), (TOKENS.eos, 7.0), (26, 5.5)):
        head[token] = level * mean / mean.square().sum()
    return model


MIXED = [student(i) if i % 2 else teacher(i, "x" * (i % 5)) for i in range(24)]
SEEDS = [1000 + i for i in range(24)]
BUDGETS = [3 + i % 10 for i in range(24)]


@pytest.fixture(scope="module")
def rollouts(restless):
    params = SamplingParams(12, temperature=1.0, max_image_skips=2)
    return generate(restless, MIXED, SkippingTokenizer(), params, SEEDS, BUDGETS)


def test_every_kind_of_row_occurs(rollouts):
    kinds = Counter((r.skips, r.ended_by) for r in rollouts)
    assert {skips for skips, _ in kinds} == {0, 1, 2}, kinds
    assert {end for _, end in kinds} == {"eos", "budget"}, kinds


def test_sampled_logprobs_are_those_of_the_packed_scorer(restless, rollouts):
    for context, rollout in zip(MIXED, rollouts, strict=True):
        logits, labels = packed_rows(restless, context, [r.token_ids for r in rollout.rounds])
        scores = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        ours = torch.tensor(rollout.logprobs)
        # a row cut by its budget has one more packed row: that of the closing token
        assert len(scores) - len(ours) == (rollout.ended_by == "budget")
        torch.testing.assert_close(ours, scores[: len(ours)], atol=TOLERANCE, rtol=0)


def asks(round_):
    return SkippingTokenizer().decode(round_.token_ids).rstrip().endswith("<image_start>")


def test_rounds_and_budgets(rollouts):
    quiet = 0
    for rollout, budget in zip(rollouts, BUDGETS, strict=True):
        used = len(rollout.token_ids)
        assert TOKENS.eos not in rollout.token_ids
        for round_ in rollout.rounds:
            extra = round_.ended_by == "eos"
            assert len(round_.logprobs) == len(round_.token_ids) + extra
        for earlier in rollout.rounds[:-1]:
            assert earlier.ended_by == "eos" and asks(earlier)
        last = rollout.rounds[-1]
        if last.ended_by == "budget":
            assert used == budget
        else:
            assert used <= budget
            assert not asks(last) or rollout.skips == 2 or used == budget
        # a request anywhere but at the tail of a round is ignored
        quiet += any(REQUEST in r.token_ids and not asks(r) for r in rollout.rounds)
    assert quiet > 0


def test_a_line_break_after_the_request_is_still_a_tail(rollouts):
    asked = [r for rollout in rollouts for r in rollout.rounds[:-1] if r.token_ids[-1] == 26]
    assert asked and all(REQUEST in r.token_ids for r in asked)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_rollouts_do_not_depend_on_batch_mates(restless, temperature):
    params = SamplingParams(8, temperature, max_image_skips=1)
    chosen = [0, 3, 5, 8]
    seeds = None if temperature == 0 else [SEEDS[i] for i in chosen]
    contexts = [MIXED[i] for i in chosen]
    budgets = [BUDGETS[i] for i in chosen]
    together = generate(restless, contexts, SkippingTokenizer(), params, seeds, budgets)
    for i, ours in enumerate(together):
        row_seeds = None if seeds is None else seeds[i : i + 1]
        (alone,) = generate(
            restless,
            contexts[i : i + 1],
            SkippingTokenizer(),
            params,
            row_seeds,
            budgets[i : i + 1],
        )
        assert [r.token_ids for r in alone.rounds] == [r.token_ids for r in ours.rounds]
        assert alone.logprobs == pytest.approx(ours.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("habits", [generation.ACCELERATOR_HABITS, generation.Habits(5, 16, False)])
def test_what_an_accelerator_is_spared_changes_nothing(restless, rollouts, monkeypatch, habits):
    """Rare looks at ended rows, attention over more slots than are filled, rows that wait."""
    monkeypatch.setattr(generation, "_habits", lambda model: habits)
    params = SamplingParams(12, temperature=1.0, max_image_skips=2)
    again = generate(restless, MIXED, SkippingTokenizer(), params, SEEDS, BUDGETS)
    for ours, reference in zip(again, rollouts, strict=True):
        assert [r.token_ids for r in ours.rounds] == [r.token_ids for r in reference.rounds]
        assert ours.logprobs == pytest.approx(reference.logprobs, abs=TOLERANCE)


def test_no_skips_allowed(restless, rollouts):
    params = SamplingParams(12, temperature=1.0, max_image_skips=0)
    none = generate(restless, MIXED, SkippingTokenizer(), params, SEEDS, BUDGETS)
    assert [r.skips for r in none] == [0] * len(MIXED)
    # the first round is the same one, and stops for good
    assert [r.rounds[0].token_ids for r in none] == [r.rounds[0].token_ids for r in rollouts]


def test_greedy_takes_the_largest_logit(restless):
    (rollout,) = generate(restless, [student()], SkippingTokenizer(), SamplingParams(6, 0.0))
    logits, labels = packed_rows(restless, student(), [r.token_ids for r in rollout.rounds])
    count = len(rollout.logprobs)
    assert torch.equal(logits.argmax(-1)[:count], labels[:count])


def test_greedy_stops_at_the_budget_and_at_the_closing_token():
    """The head is set so that one fixed token, or the closing token, always wins."""
    model = tiny_bagel(seed=5).requires_grad_(False)
    batch = pack([[*student(), Text((70,) * 9, loss=True)]], TOKENS)
    model.language_model.model.embed_tokens.weight[70] *= 50  # the token drowns its context
    hidden = model(batch)
    head = model.language_model.lm_head.weight
    head.zero_()
    head[70] = hidden[0] / hidden[0].square().sum() + hidden[1] / hidden[1].square().sum()
    (rollout,) = generate(model, [student()], FakeTokenizer(), SamplingParams(5, 0.0))
    assert rollout.token_ids == (70,) * 5 and rollout.ended_by == "budget"
    assert rollout.rounds[0].logprobs == rollout.logprobs and len(rollout.logprobs) == 5
    head[TOKENS.eos] = 2 * hidden[1:].mean(0) / hidden[1].square().sum()
    (rollout,) = generate(model, [student()], FakeTokenizer(), SamplingParams(5, 0.0))
    assert rollout.token_ids == (70,) and rollout.ended_by == "eos" and rollout.skips == 0
    assert len(rollout.logprobs) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_follow_the_softmax(restless, temperature):
    context, draws = [Text((30, 31))], 4000
    logits, _ = packed_rows(restless, context, [()])
    probs = (logits[0].double() / temperature).softmax(-1)
    params = SamplingParams(1, temperature, max_image_skips=0)
    rollouts = generate(
        restless, [context] * draws, FakeTokenizer(), params, seeds=list(range(draws))
    )
    first = [r.token_ids[0] if r.token_ids else TOKENS.eos for r in rollouts]
    counts = torch.bincount(torch.tensor(first), minlength=512).double()
    top = probs.topk(9).indices
    expected = torch.cat([probs[top], 1 - probs[top].sum()[None]]) * draws
    observed = torch.cat([counts[top], draws - counts[top].sum()[None]])
    statistic = float(((observed - expected).square() / expected.clamp(min=1e-9)).sum())
    assert statistic < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    # log-probs stay those of temperature 1
    reference = logits[0].log_softmax(-1)
    assert rollouts[0].logprobs[0] == pytest.approx(float(reference[first[0]]), abs=TOLERANCE)


def test_seeds_are_streams(restless):
    params = SamplingParams(6, 1.0, max_image_skips=0)
    contexts = [student()] * 3
    first, second, third = generate(restless, contexts, FakeTokenizer(), params, seeds=[4, 4, 5])
    assert first.token_ids == second.token_ids != third.token_ids
    assert (first.seed, third.seed) == (4, 5)


def test_contexts_are_not_changed(restless):
    context = teacher()
    before = [dataclasses.replace(segment) for segment in context]
    generate(restless, [context], FakeTokenizer(), SamplingParams(2, 0.0))
    assert len(context) == len(before)
    assert all(
        a is b or a == b or torch.equal(a.patches, b.patches)
        for a, b in zip(context, before, strict=True)
    )


def test_bad_requests_are_refused(restless):
    with pytest.raises(ValueError, match="sampling needs a seed per row"):
        generate(restless, [student()], FakeTokenizer(), SamplingParams(2, 1.0))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        SamplingParams(0)
    with pytest.raises(ValueError, match=r"temperature must be >= 0 .*got -1"):
        SamplingParams(1, -1)
    with pytest.raises(ValueError, match="budgets must be at least 1, got 0"):
        generate(restless, [student()], FakeTokenizer(), SamplingParams(2, 0.0), budgets=[0])
    assert generate(restless, [], FakeTokenizer(), SamplingParams(2, 0.0)) == []
