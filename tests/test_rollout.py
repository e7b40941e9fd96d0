"""On-policy sampling: exact scores, the cap that acts before it, streams by (seed, step, row)."""

import dataclasses

import pytest
import torch

from data.contexts import teacher_context
from data.streams import stream_seed
from modeling.bagel import text_logits
from modeling.generation import Rollout, Round
from modeling.pretrained import load_pretrained
from modeling.sequence import Image, Text, pack, segment_length
from tests.training import base_processor, draws, opsd_config, same_segments, workspace
from train import rollout
from train.config import SamplingArguments
from train.rollout import MAX_RESAMPLES, Trajectory, context_length, prepare, sample

SAMPLING = SamplingArguments(sample_max_new_tokens=12, min_completion=4, max_forward_tokens=256)


@pytest.fixture(scope="module")
def model():
    return load_pretrained(workspace() / "base").eval()


@pytest.fixture(scope="module")
def processor():
    return base_processor()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    config = opsd_config(tmp_path_factory.mktemp("rows"), global_batch=16)
    return draws(config)


def prompts_of(rows, processor, sampling=SAMPLING, step=0, seed=5, noise_vt=False):
    return prepare(rows, processor, sampling, step, seed, noise_vt)


def ids(trajectories):
    return {t.prompt.row: [r.token_ids for r in t.rollout.rounds] for t in trajectories}


def scored(model, processor, segments):
    """Log-probs that the packed forward gives to every label, and the labels."""
    batch = pack([segments], processor.tokenizer.special)
    with torch.no_grad():
        logprobs = model(batch, head=text_logits).double().log_softmax(-1)
    return logprobs.gather(1, batch.labels[:, None])[:, 0], batch.labels


# ---- what is scored is what was sampled -----------------------------------------------------


def test_sampled_logprobs_are_those_of_the_packed_student(model, processor, rows):
    trajectories = sample(model, prompts_of(rows, processor), processor, SAMPLING.params, 0, 5)
    assert {t.rollout.skips for t in trajectories} == {0, 1}  # with and without an image skip
    assert {t.ends_open for t in trajectories} == {False, True}
    special = processor.tokenizer.special
    for trajectory in trajectories:
        packed, labels = scored(model, processor, trajectory.student)
        sampled = [
            token
            for r in trajectory.rollout.rounds
            for token in (*r.token_ids, *([special.eos] if r.ended_by == "eos" else []))
        ]
        assert labels[: len(sampled)].tolist() == sampled
        assert len(labels) == len(sampled) + trajectory.ends_open  # the label that was cut off
        recorded = torch.tensor(trajectory.rollout.logprobs, dtype=torch.float64)
        assert float((packed[: len(sampled)] - recorded).abs().max()) <= 1e-4


def test_a_round_that_asks_for_an_image_opens_the_next_one(model, processor, rows):
    trajectories = sample(model, prompts_of(rows, processor), processor, SAMPLING.params, 0, 5)
    request = processor.tokenizer.encode("<image_start>")
    for trajectory in trajectories:
        for earlier in trajectory.rollout.rounds[:-1]:
            assert earlier.ended_by == "eos"
            assert list(earlier.token_ids[-len(request) :]) == request
        blocks = trajectory.completion
        assert [b.token_ids for b in blocks] == [r.token_ids for r in trajectory.rollout.rounds]
        assert all(isinstance(b, Text) and b.loss for b in blocks)


def test_no_skips_when_none_are_allowed(model, processor, rows):
    sampling = dataclasses.replace(SAMPLING, sample_max_image_skips=0)
    prompts = prompts_of(rows, processor, sampling)
    trajectories = sample(model, prompts, processor, sampling.params, 0, 5)
    assert {len(t.rollout.rounds) for t in trajectories} == {1}


def test_student_and_teacher_rows_align(model, processor, rows):
    trajectories = sample(model, prompts_of(rows, processor), processor, SAMPLING.params, 0, 5)
    special = processor.tokenizer.special
    student = pack([t.student for t in trajectories], special)
    teacher = pack([t.teacher for t in trajectories], special)
    assert torch.equal(student.labels, teacher.labels)
    assert torch.equal(student.loss_sample, teacher.loss_sample)
    inputs = [
        batch.token_ids[torch.isin(batch.token_index, batch.loss_rows)]
        for batch in (student, teacher)
    ]
    assert torch.equal(*inputs)
    assert len(teacher) > len(student)


# ---- random streams -------------------------------------------------------------------------


def test_completions_do_not_depend_on_the_batch(model, processor, rows):
    prompts = prompts_of(rows, processor)
    together = ids(sample(model, prompts, processor, SAMPLING.params, 3, 5))
    assert len(together) >= 12
    halves = {}
    for half in (prompts[8:], prompts[:8]):  # as two ranks would
        halves |= ids(sample(model, half, processor, SAMPLING.params, 3, 5))
    assert halves == together
    # another row's larger budget lengthens the random table, not the numbers of this row
    wide = [dataclasses.replace(p, budget=40) if p.row == 0 else p for p in prompts]
    params = dataclasses.replace(SAMPLING.params, max_new_tokens=40)
    longer = ids(sample(model, wide, processor, params, 3, 5))
    assert {row: longer[row] for row in together if row} == {
        row: together[row] for row in together if row
    }


def test_streams_are_keyed_by_seed_step_and_row(model, processor, rows):
    same = [(row, rows[0][1]) for row in range(6)]  # one record, six rows
    prompts = prompts_of(same, processor)
    first = ids(sample(model, prompts, processor, SAMPLING.params, 0, 5))
    assert len({str(value) for value in first.values()}) > 1
    assert ids(sample(model, prompts, processor, SAMPLING.params, 0, 5)) == first
    assert ids(sample(model, prompts, processor, SAMPLING.params, 1, 5)) != first
    assert ids(sample(model, prompts, processor, SAMPLING.params, 0, 6)) != first


class Writer:
    """Stands for `generate`: answers from a table row seed -> token ids, remembers the calls."""

    def __init__(self, empty_seeds=()):
        self.empty_seeds, self.calls = set(empty_seeds), []

    def __call__(self, model, contexts, tokenizer, params, seeds, budgets, workspace):
        self.calls.append(list(zip(seeds, budgets, strict=True)))
        return [
            Rollout((Round(() if seed in self.empty_seeds else (7,), "eos", (0.0,) * 2),), seed)
            for seed in seeds
        ]


def test_only_empty_rows_are_sampled_again_and_not_for_ever(monkeypatch, processor, rows):
    def key(row, attempt):
        return stream_seed(5, "rollout", 2, row, attempt)

    attempts = range(1 + MAX_RESAMPLES)
    writer = Writer([key(1, 0)] + [key(2, attempt) for attempt in attempts])
    monkeypatch.setattr(rollout, "generate", writer)
    prompts = prompts_of(rows[:4], processor)
    trajectories = sample(None, prompts, processor, SAMPLING.params, 2, 5)
    assert [[seed for seed, _ in call] for call in writer.calls] == [
        [key(0, 0), key(1, 0), key(2, 0), key(3, 0)],
        [key(1, 1), key(2, 1)],
        [key(2, 2)],
    ]
    assert [t.prompt.row for t in trajectories] == [0, 1, 3]  # in order, row 2 is left out
    assert trajectories[1].rollout.seed == key(1, 1)


# ---- the cap --------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", [0, 1, 2])
def test_budget_fills_the_cap_exactly(processor, rows, skips):
    longest = max(context_length(p.teacher) for p in prompts_of(rows, processor))
    for spare in (8, 9, 15, 40):
        cap = longest + 2 * (1 + skips) + spare
        sampling = SamplingArguments(24, 1.0, skips, cap, 8)
        for prompt in prompts_of(rows, processor, sampling):
            fixed = context_length(prompt.teacher) + 2 * (1 + skips)
            assert prompt.budget == min(24, cap - fixed) >= 8
            # the longest teacher sequence: the whole budget, spread over all rounds
            rounds = [Round((9,), "eos", ())] * skips
            rounds.append(Round((9,) * (prompt.budget - skips), "budget", ()))
            sequence = Trajectory(prompt, Rollout(tuple(rounds))).teacher
            tokens = len(pack([sequence], processor.tokenizer.special))
            assert tokens <= cap
            if prompt.budget < 24:
                assert tokens == cap


def test_sampling_stays_below_the_cap(model, processor, rows):
    longest = max(context_length(p.teacher) for p in prompts_of(rows, processor))
    cap = longest + 4 + 6
    sampling = dataclasses.replace(SAMPLING, max_forward_tokens=cap)
    prompts = prompts_of(rows, processor, sampling)
    assert {p.image_scale for p in prompts} == {1.0}
    trajectories = sample(model, prompts, processor, sampling.params, 0, 5)
    assert any(t.ends_open for t in trajectories)
    for trajectory in trajectories:
        written = len(trajectory.rollout.token_ids)
        assert written <= trajectory.prompt.budget <= 12
        assert trajectory.ends_open == (written == trajectory.prompt.budget)
        assert sum(segment_length(s) for s in trajectory.teacher) <= cap


def test_visual_thoughts_shrink_only_as_far_as_needed(processor, rows):
    whole = {p.row: p for p in prompts_of(rows, processor)}
    assert {p.image_scale for p in whole.values()} == {1.0}
    length = {row: context_length(p.teacher) for row, p in whole.items()}
    cap = min(length.values()) + 4 + SAMPLING.min_completion  # the shortest just fits
    shrunk = prompts_of(rows, processor, dataclasses.replace(SAMPLING, max_forward_tokens=cap))
    assert len(shrunk) == len(rows)
    for prompt in shrunk:
        fits = length[prompt.row] == min(length.values())
        assert (prompt.image_scale == 1.0) == fits
        assert same_segments(prompt.student, whole[prompt.row].student)  # never the problem image
        before = [s for s in whole[prompt.row].teacher if isinstance(s, Image)]
        after = [s for s in prompt.teacher if isinstance(s, Image)]
        assert torch.equal(before[0].patches, after[0].patches)
        assert len(before) == len(after) == 2
        assert (len(after[1].patches) == len(before[1].patches)) == fits
        assert prompt.budget >= SAMPLING.min_completion


def test_a_row_that_cannot_fit_is_left_out(processor, rows):
    one_patch = 1 + 2  # with its framing tokens: visual thoughts do not get smaller
    least = {
        row: context_length(teacher_context(drawn.example, processor, vt="none")) + one_patch
        for row, drawn in rows
    }
    cap = min(least.values()) + 4 + SAMPLING.min_completion
    kept = prompts_of(rows, processor, dataclasses.replace(SAMPLING, max_forward_tokens=cap))
    assert {p.row for p in kept} == {row for row, n in least.items() if n == min(least.values())}
    assert 0 < len(kept) < len(rows)
    assert {p.budget for p in kept} == {SAMPLING.min_completion}
    tight = dataclasses.replace(SAMPLING, max_forward_tokens=cap - 1)
    assert prompts_of(rows, processor, tight) == []


# ---- noise control --------------------------------------------------------------------------


def test_noise_takes_the_place_of_the_visual_thoughts_only(model, processor, rows):
    real, noise = prompts_of(rows, processor), prompts_of(rows, processor, noise_vt=True)
    for one, other in zip(real, noise, strict=True):
        assert same_segments(one.student, other.student)
        assert one.budget == other.budget
        differing = [
            i
            for i, pair in enumerate(zip(one.teacher, other.teacher, strict=True))
            if not same_segments(*([segment] for segment in pair))
        ]
        assert differing == [len(one.student) + 1]  # after the intro, before the transition
        seen, drawn = one.teacher[differing[0]], other.teacher[differing[0]]
        assert (seen.height, seen.width) == (drawn.height, drawn.width)
        assert abs(float(drawn.patches.mean())) < 0.05
        assert abs(float(drawn.patches.std()) - 1) < 0.05
    first = ids(sample(model, real, processor, SAMPLING.params, 0, 5))
    assert ids(sample(model, noise, processor, SAMPLING.params, 0, 5)) == first


def test_noise_is_keyed_by_seed_step_and_row(processor, rows):
    two = [(0, rows[0][1]), (1, rows[0][1])]

    def pixels(**changes):
        prompts = prompts_of(two, processor, noise_vt=True, **changes)
        return [prompt.teacher[-2].patches for prompt in prompts]

    first = pixels()
    assert all(torch.equal(a, b) for a, b in zip(first, pixels(), strict=True))
    assert not torch.equal(*first)
    for changed in (pixels(step=1), pixels(seed=6)):
        assert not torch.equal(first[0], changed[0])
    alone = prepare(two[1:], processor, SAMPLING, 0, 5, True)[0].teacher[-2].patches
    assert torch.equal(alone, first[1])


# ---- means by task ----------------------------------------------------------------------------


def trajectory(task, *lengths):
    rounds = tuple(Round(tuple(range(n)), "eos", (0.0,) * (n + 1)) for n in lengths)
    return Trajectory(rollout.Prompt(0, [], [], 9, task=task), Rollout(rounds))


def test_means_are_per_trajectory_first_and_by_task():
    micro = [trajectory("a", 1), trajectory("b", 2), trajectory("a", 1, 0)]
    rows = torch.tensor([1.0, 3.0, 6.0, 6.0, 9.0, 4.0, 5.0, 0.0])  # a round has a row for its end
    found = rollout.means_by_task("k", rows, micro)
    assert {name: values.tolist() for name, values in found.items()} == {
        "k": [2.0, 7.0, 3.0],
        "k/a": [2.0, 3.0],
        "k/b": [7.0],
    }
