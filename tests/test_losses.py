"""Divergences, policy loss, cross-entropy and row weights against closed forms and an oracle."""

import copy
import gc
import json
import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import train.losses
from train.divergence import (
    aligned_logprobs,
    clipped_rows,
    full_logprobs,
    topk_from_logits,
)
from train.losses import (
    JSDConfig,
    TeacherTopK,
    chunked_cross_entropy,
    chunked_jsd,
    chunked_logprobs,
    chunked_policy_loss,
    chunked_token_kl,
    divergence_from_logprobs,
    generalized_jsd,
    jsd_rows,
    kept_kl,
    policy_rows,
    teacher_topk,
    token_kl,
    token_logprobs,
    token_mean_weights,
    trajectory_mean_weights,
)

DATA = Path(__file__).parent / "data"
PLAIN = JSDConfig(top_k=0, clip_mode="off")
MODES = ["renorm", "tail", "none"]


def logits(rows: int, vocab: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=generator, dtype=dtype)


def oracle(student, teacher, beta, top_k=0, mode="renorm", tau=1.0, clip=math.inf):
    """Row divergences in float64, straight from probabilities."""
    p, q = (torch.softmax(x.double() / tau, -1) for x in (teacher, student))
    if top_k:
        ids = teacher.topk(top_k, -1).indices
        p, q = p.gather(-1, ids), q.gather(-1, ids)
        if mode == "renorm":
            p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        elif mode == "tail":
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    m = beta * p + (1 - beta) * q
    if beta in (0.0, 1.0):
        a, b = (p, q) if beta == 0.0 else (q, p)
        terms = a * (a / b).log() + (b - a if mode == "none" else 0)
    else:
        terms = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    return tau**2 * terms.clamp(max=clip).sum(-1)


# ---- numbers --------------------------------------------------------------------------------


def two_symbols(p: float) -> torch.Tensor:
    return torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.9 * math.log(9) - 0.1 * math.log(9)),  # KL(T || S), T = (.9, .1), S = (.1, .9)
        (1.0, 0.9 * math.log(9) - 0.1 * math.log(9)),
        (0.5, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),
        (0.25, 0.25 * (0.9 * math.log(3) + 0.1 * math.log(1 / 7))
               + 0.75 * (0.1 * math.log(1 / 3) + 0.9 * math.log(9 / 7))),
    ],
)  # fmt: skip
def test_two_symbols_in_closed_form(beta, expected):
    rows = generalized_jsd(two_symbols(0.1), two_symbols(0.9), replace(PLAIN, beta=beta))
    assert rows.tolist() == pytest.approx([expected], rel=1e-12)


def test_endpoints_are_the_two_directions_of_the_kl():
    student, teacher = two_symbols(0.2), two_symbols(0.7)
    teacher_to_student = 0.7 * math.log(0.7 / 0.2) + 0.3 * math.log(0.3 / 0.8)
    student_to_teacher = 0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3)
    for beta, expected in ((0.0, teacher_to_student), (1.0, student_to_teacher)):
        rows = generalized_jsd(student, teacher, replace(PLAIN, beta=beta))
        assert rows.item() == pytest.approx(expected, rel=1e-12)
    assert token_kl(teacher, student).item() == pytest.approx(teacher_to_student, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("tau", "clip"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.02)])
def test_matches_the_oracle(mode, top_k, beta, tau, clip):
    student, teacher = logits(6, 17, 0), logits(6, 17, 1)
    config = JSDConfig(beta, top_k, mode, clip, "entry", tau, allow_signed_clip=True)
    expected = oracle(student, teacher, beta, top_k, mode if top_k else "", tau, clip or math.inf)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, config), expected, rtol=1e-10, atol=1e-12
    )
    single = generalized_jsd(student.float(), teacher.float(), config)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def golden():
    return (
        load_file(DATA / "jsd_golden.safetensors"),
        json.loads((DATA / "jsd_golden.json").read_text()),
    )


@pytest.mark.parametrize(
    "name",
    [
        "b0.5_k16_c0.05_T1.0",
        "b0.3_k64_cNone_T1.0",
        "b0.0_k16_c0.01_T1.0",
        "b1.0_kNone_cNone_T1.0",
        "b0.5_k16_c0.05_T2.0",
    ],
)
def test_golden_jsd(golden, name):
    tensors, meta = golden
    case = meta["cases"][name]
    config = JSDConfig(
        beta=case["beta"],
        top_k=case["top_k"] or 0,
        token_clip=case["token_clip"] or 0.0,
        temperature=case["temperature"],
        allow_signed_clip=True,
    )
    student = tensors["student"].clone().requires_grad_()
    rows = generalized_jsd(student, tensors["teacher"], config)
    torch.testing.assert_close(rows, torch.tensor(case["rows"]), rtol=2e-6, atol=1e-7)
    if f"grad.{name}" in tensors:
        (grad,) = torch.autograd.grad(rows[0] / meta["rows_of_mean"], student)
        expected = tensors[f"grad.{name}"][0]
        assert (grad[0] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_golden_policy_gradient(golden, tau):
    tensors, meta = golden
    student = tensors["student"].clone().requires_grad_()
    ids = tensors["sampled_ids"]
    rows = policy_rows(
        token_logprobs(student, ids, tau), token_logprobs(tensors["teacher"], ids, tau)
    )
    (grad,) = torch.autograd.grad(rows[0] / meta["rows_of_mean"], student)
    torch.testing.assert_close(grad[:1], tensors[f"grad.tinker_T{tau}_labFalse"], rtol=1e-5, atol=0)


# ---- properties -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_top_k_of_the_vocabulary_equals_no_top_k(mode):
    student, teacher = logits(4, 11, 2), logits(4, 11, 3)
    full = generalized_jsd(student, teacher, replace(PLAIN, beta=0.3))
    for k in (11, 400):
        config = replace(PLAIN, beta=0.3, top_k=k, top_k_mode=mode)
        torch.testing.assert_close(generalized_jsd(student, teacher, config), full)
    # Also when the ids are explicit and only happen to be all of them.
    ids = torch.arange(11).flip(0).expand(4, 11)
    explicit = TeacherTopK(ids, F.log_softmax(teacher, -1).gather(-1, ids))
    config = replace(PLAIN, beta=0.3, top_k_mode=mode)
    torch.testing.assert_close(jsd_rows(student, explicit, config), full)


def test_half_is_symmetric_and_bounded_by_ln_2():
    a, b = logits(50, 9, 4), logits(50, 9, 5)
    forth, back = generalized_jsd(a, b, PLAIN), generalized_jsd(b, a, PLAIN)
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=0)
    assert (forth > 0).all()
    assert (forth < math.log(2)).all()
    disjoint = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    rows = generalized_jsd(disjoint, disjoint.flip(0), PLAIN)
    assert rows.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)


def test_reversed_beta_swaps_the_sides():
    a, b = logits(5, 9, 6), logits(5, 9, 7)
    torch.testing.assert_close(
        generalized_jsd(a, b, replace(PLAIN, beta=0.2)),
        generalized_jsd(b, a, replace(PLAIN, beta=0.8)),
    )


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("mode", MODES)
def test_equal_sides_give_exactly_zero_loss_and_gradient(mode, top_k):
    same = (10 * logits(5, 50, 8)).float()
    student = same.clone().requires_grad_()
    config = JSDConfig(top_k=top_k, top_k_mode=mode)
    rows = generalized_jsd(student, same, config)
    rows.sum().backward()
    assert rows.tolist() == [0.0] * 5
    assert student.grad.abs().max() == 0.0


def test_extreme_logits_stay_finite():
    student = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 90.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 0.0, 300.0], [0.0, 90.0, 0.0]])
    for mode in MODES:
        for k in (0, 1, 2):
            rows = generalized_jsd(student, teacher, JSDConfig(top_k=k, top_k_mode=mode))
            (grad,) = torch.autograd.grad(rows.sum(), student)
            assert rows.isfinite().all()
            assert grad.isfinite().all()


def test_renorm_is_blind_outside_k_and_tail_is_not():
    teacher = torch.tensor([[5.0, 4.0, 0.0, 0.0]]).double()
    student = teacher + torch.tensor([0.0, 0.0, 20.0, 20.0])  # nearly all mass outside the top 2
    blind = generalized_jsd(student, teacher, replace(PLAIN, top_k=2))
    seen = generalized_jsd(student, teacher, replace(PLAIN, top_k=2, top_k_mode="tail"))
    assert blind.item() == pytest.approx(0.0, abs=1e-12)
    assert seen.item() > 0.6


def test_unnormalised_endpoint_is_non_negative():
    student, teacher = logits(200, 8, 9), logits(200, 8, 10)
    for beta in (0.0, 1.0):
        config = replace(PLAIN, beta=beta, top_k=2, top_k_mode="none")
        assert generalized_jsd(student, teacher, config).min() > 0
        # The plain terms would not be: that is what the correction is for.
        pair = aligned_logprobs(student, teacher_topk_of(teacher, config), config)
        assert divergence_from_logprobs(*pair, beta).sum(-1).min() < 0


def teacher_topk_of(teacher_logits, config):
    identity = nn.Linear(teacher_logits.shape[1], teacher_logits.shape[1], bias=False)
    identity.weight = nn.Parameter(torch.eye(teacher_logits.shape[1], dtype=teacher_logits.dtype))
    return teacher_topk(teacher_logits, identity, config)


# ---- clip -----------------------------------------------------------------------------------


def test_entry_and_token_clip_by_hand():
    student, teacher = two_symbols(0.1), two_symbols(0.9)
    high = 0.5 * 0.9 * math.log(1.8) + 0.5 * 0.1 * math.log(0.2)  # each of the two entries: .184
    config = JSDConfig(top_k=0, token_clip=0.05)
    assert generalized_jsd(student, teacher, config).item() == pytest.approx(0.1)
    config = replace(config, token_clip=0.2)
    assert generalized_jsd(student, teacher, config).item() == pytest.approx(2 * high)
    config = replace(config, clip_mode="token")
    assert generalized_jsd(student, teacher, config).item() == pytest.approx(0.2)
    config = replace(config, temperature=2.0, token_clip=0.01)  # limited first, scaled after
    assert generalized_jsd(student, teacher, config).item() == pytest.approx(0.04)
    for off in (replace(config, clip_mode="off"), replace(config, token_clip=0.0)):
        assert generalized_jsd(student, teacher, off).item() > 0.04


@pytest.mark.parametrize("clip_mode", ["entry", "token"])
def test_clip_is_monotone(clip_mode):
    student, teacher = logits(20, 30, 11), logits(20, 30, 12)
    limits = [0.001, 0.01, 0.05, 0.2, 10.0]
    rows = [
        generalized_jsd(student, teacher, JSDConfig(0.5, 0, token_clip=c, clip_mode=clip_mode))
        for c in limits
    ]
    for smaller, larger in zip(rows, rows[1:], strict=False):
        assert (smaller <= larger).all()
    assert (rows[0] < rows[-1]).all()
    torch.testing.assert_close(rows[-1], generalized_jsd(student, teacher, PLAIN))


def test_saturated_entries_have_exactly_zero_gradient():
    student_logp = F.log_softmax(logits(1, 6, 13), -1).requires_grad_()
    teacher_logp = F.log_softmax(logits(1, 6, 14), -1)
    terms = divergence_from_logprobs(student_logp, teacher_logp, 0.5).detach()[0]
    limit = terms.median().item()
    config = JSDConfig(top_k=0, token_clip=limit)
    rows, share = clipped_rows(student_logp, teacher_logp, TeacherTopK(None, teacher_logp), config)
    (grad,) = torch.autograd.grad(rows.sum(), student_logp)
    saturated = terms > limit
    assert saturated.sum() == 3
    assert share.item() == 0.5
    assert (grad[0][saturated] == 0).all()
    assert (grad[0][~saturated] != 0).all()


def test_a_fully_saturated_row_has_exactly_zero_gradient():
    student = two_symbols(0.1).requires_grad_()
    for clip_mode in ("entry", "token"):
        rows = generalized_jsd(student, two_symbols(0.9), JSDConfig(top_k=0, clip_mode=clip_mode))
        (grad,) = torch.autograd.grad(rows.sum(), student)
        assert grad.abs().max() == 0.0


# ---- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("clip", "clip_mode"), [(0.0, "off"), (0.03, "entry"), (0.5, "token")])
def test_gradient_against_finite_differences(mode, beta, clip, clip_mode):
    student, teacher = logits(3, 8, 15).requires_grad_(), logits(3, 8, 16)
    config = JSDConfig(beta, 4, mode, clip, clip_mode, 1.5, allow_signed_clip=True)
    assert torch.autograd.gradcheck(lambda x: generalized_jsd(x, teacher, config), student)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_teacher_receives_no_gradient(beta):
    student = logits(3, 8, 17).requires_grad_()
    teacher = logits(3, 8, 18).requires_grad_()
    generalized_jsd(student, teacher, replace(PLAIN, beta=beta)).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    logp = F.log_softmax(teacher, -1)
    divergence_from_logprobs(F.log_softmax(student, -1), logp, beta).sum().backward()
    assert teacher.grad is None


# ---- chunked heads --------------------------------------------------------------------------


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(6, 40, bias=False).double()


@pytest.fixture
def hidden():
    return logits(11, 6, 19), logits(11, 6, 20)


@pytest.mark.parametrize(
    ("top_k", "mode"), [(0, "renorm"), (7, "renorm"), (7, "tail"), (7, "none")]
)
@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 100])
def test_chunked_equals_plain_with_gradients(head, hidden, top_k, mode, chunk_rows):
    config = JSDConfig(0.4, top_k, mode, token_clip=0.02, temperature=1.3)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    student = hidden[0].clone().requires_grad_()
    plain = (weights * generalized_jsd(head(student), head(hidden[1]).detach(), config)).sum()
    expected = torch.autograd.grad(plain, [student, head.weight])

    teacher = teacher_topk(hidden[1], head, config, chunk_rows)
    output = chunked_jsd(student, head, teacher, config, weights, chunk_rows)
    grads = torch.autograd.grad(output.loss, [student, head.weight])
    torch.testing.assert_close(output.loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-13)
    assert not teacher.logprobs.requires_grad
    assert not output.row_jsd.requires_grad


CLIPS = [(0.0, "off"), (0.02, "entry"), (0.5, "token")]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 7, 40])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("clip", "clip_mode"), CLIPS)
def test_every_option_has_the_gradients_of_the_plain_form(
    hidden, beta, top_k, mode, clip, clip_mode
):
    """With a bias; in float64 and float32; entries by themselves (4) and as a table (11)."""
    config = JSDConfig(beta, top_k, mode, clip, clip_mode, 1.3, allow_signed_clip=True)
    for dtype, rtol, atol in ((torch.float64, 1e-10, 1e-14), (torch.float32, 1e-5, 1e-6)):
        torch.manual_seed(0)
        head = nn.Linear(6, 40).to(dtype)
        student, teacher_rows = hidden[0].to(dtype).requires_grad_(), hidden[1].to(dtype)
        weights = torch.rand(11, generator=torch.Generator().manual_seed(1)).to(dtype)
        leaves = [student, head.weight, head.bias]
        rows = generalized_jsd(head(student), head(teacher_rows).detach(), config)
        expected = torch.autograd.grad((weights * rows).sum(), leaves)
        for chunk_rows in (4, 11):
            teacher = teacher_topk(teacher_rows, head, config, chunk_rows)
            output = chunked_jsd(student, head, teacher, config, weights, chunk_rows)
            torch.testing.assert_close(output.row_jsd, rows.detach(), rtol=rtol, atol=atol)
            found = torch.autograd.grad(output.loss, leaves)
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
            assert all(grad.abs().max() > 1e-4 for grad in found)


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("mode", MODES)
def test_equal_sides_give_exactly_zero_in_chunks(mode, top_k):
    torch.manual_seed(0)
    head, rows = nn.Linear(6, 40, bias=False), logits(11, 6, 22, torch.float32)
    config = JSDConfig(top_k=top_k, top_k_mode=mode)
    student = rows.clone().requires_grad_()
    teacher = teacher_topk(rows, head, config, 4)
    output = chunked_jsd(student, head, teacher, config, torch.ones(11), 4)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.row_jsd.tolist() == [0.0] * 11
    assert student.grad.abs().max() == head.weight.grad.abs().max() == 0.0


def test_diagnostics_of_the_student(head, hidden):
    config = JSDConfig(0.5, 3, token_clip=0.02, temperature=2.0)
    teacher = teacher_topk(hidden[1], head, config, 4)
    weights = torch.full((11,), 1 / 11)
    output = chunked_jsd(hidden[0].requires_grad_(), head, teacher, config, weights, 4)
    output.loss.backward()
    p = torch.softmax(head(hidden[0]).detach() / 2, -1)
    torch.testing.assert_close(output.student_entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(output.mass_outside, 1 - p.gather(-1, teacher.ids).sum(-1))
    q = torch.softmax(head(hidden[1]).detach() / 2, -1).gather(-1, teacher.ids)
    torch.testing.assert_close(teacher.logprobs, q.log())
    q, p = q / q.sum(-1, keepdim=True), p.gather(-1, teacher.ids)
    p = p / p.sum(-1, keepdim=True)
    m = (p + q) / 2
    terms = 0.5 * (q * (q / m).log() + p * (p / m).log())
    torch.testing.assert_close(output.clipped_share, (terms > 0.02).double().mean(-1))
    assert 0 < output.clipped_share.mean() < 1


def test_projection_uses_the_wider_dtype(hidden):
    half_head = nn.Linear(6, 40, bias=True).bfloat16()
    rows = hidden[0].float()
    wide = chunked_logprobs(rows, half_head, torch.zeros(11).long())
    logits32 = F.linear(rows, half_head.weight.float(), half_head.bias.float())
    torch.testing.assert_close(wide, F.log_softmax(logits32, -1)[:, 0])
    narrow = chunked_logprobs(rows.bfloat16(), half_head, torch.zeros(11).long())
    assert narrow.dtype == torch.float32  # the softmax is float32 even over bfloat16 logits
    expected = F.log_softmax(half_head(rows.bfloat16()).float(), -1)[:, 0]
    torch.testing.assert_close(narrow, expected)


def test_projection_under_autocast_is_that_of_narrow_states_and_weights(hidden):
    """An unsharded run (autocast) and a sharded one (weights gathered in bfloat16) score alike."""
    rows, teacher_rows = (x.float() for x in hidden)
    wide = nn.Linear(6, 40, bias=False)
    narrow = copy.deepcopy(wide).bfloat16()
    config, ids, weights = JSDConfig(0.5, 7), torch.arange(11), torch.ones(11)

    def scores(rows, teacher_rows, head):
        out = chunked_jsd(rows, head, teacher_topk(teacher_rows, head, config, 4), config, weights)
        return chunked_logprobs(rows, head, ids, chunk_rows=4), out.row_jsd, out.student_entropy

    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = scores(rows, teacher_rows, wide)
    gathered = scores(rows.bfloat16(), teacher_rows.bfloat16(), narrow)
    exact = scores(rows, teacher_rows, wide)
    for ours, theirs, other in zip(under_autocast, gathered, exact, strict=True):
        assert ours.dtype == torch.float32  # what follows the product
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, other)


def test_diagnostics_are_not_repeated_in_the_backward_pass(head, hidden, monkeypatch):
    calls = []
    original = train.losses.row_statistics
    monkeypatch.setattr(
        train.losses, "row_statistics", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    config = JSDConfig(0.5, 7)
    teacher = teacher_topk(hidden[1], head, config)
    rows = hidden[0].requires_grad_()
    chunked_jsd(rows, head, teacher, config, torch.ones(11), 4).loss.backward()
    assert len(calls) == 3


def test_zero_rows_give_a_zero_loss_that_can_be_backpropagated(head):
    rows = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    config = JSDConfig(0.5, 7)
    output = chunked_jsd(rows, head, teacher_topk(rows, head, config), config, torch.zeros(0))
    empty = torch.zeros(0, dtype=torch.long)
    loss = output.loss + chunked_cross_entropy(rows, head, empty, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad.abs().max() == 0.0


def test_chunked_cross_entropy_equals_the_dense_one(head, hidden):
    labels = torch.tensor([3, -100, 39, 0, 1, -100, 5, 5, 5, 8, 21])
    rows = hidden[0].requires_grad_()
    expected = F.cross_entropy(head(rows), labels)
    weights = token_mean_weights(labels).double()
    loss = chunked_cross_entropy(rows, head, labels, weights, chunk_rows=3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [rows, head.weight]),
        torch.autograd.grad(expected, [rows, head.weight]),
    )


def test_chunked_policy_loss_has_the_policy_gradient(head, hidden):
    ids = torch.tensor([3, -100, 39, 0, 1, 2, 5, 5, 5, 8, 21])
    weights = token_mean_weights(ids).double()
    teacher = chunked_logprobs(hidden[1], head, ids, 2.0, chunk_rows=4).detach()
    rows = hidden[0].requires_grad_()
    loss = chunked_policy_loss(rows, head, teacher, ids, weights, 2.0, chunk_rows=4)
    kept = ids != -100
    student = F.log_softmax(head(rows)[kept] / 2, -1).gather(-1, ids[kept, None])[:, 0]
    advantage = teacher[kept] - student.detach()
    torch.testing.assert_close(loss, -(advantage * student).mean())
    (grad,) = torch.autograd.grad(loss, rows)
    (expected,) = torch.autograd.grad(-(advantage * student).mean(), rows)
    torch.testing.assert_close(grad, expected)
    assert grad[1].abs().max() == 0


def test_kept_kl_by_hand():
    """Teacher (.5, .25, .125, .125) with the first two kept, the others as one entry of .25."""
    teacher = TeacherTopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).double().log())
    student = torch.tensor([[0.25, 0.25, 0.3, 0.2]]).double().log()
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5)
    assert kept_kl(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kept_kl_is_the_kl_where_all_is_kept_and_less_elsewhere(temperature):
    student, teacher = logits(9, 31, 20), logits(9, 31, 21)
    logp = full_logprobs(student, temperature)
    exact = token_kl(teacher / temperature, student / temperature)
    for k in (0, 31, 12, 3, 1):
        config = JSDConfig(0.5, k, temperature=temperature)
        found = kept_kl(logp, topk_from_logits(teacher, config))
        if k in (0, 31):
            torch.testing.assert_close(found, exact)
        else:
            assert (found < exact).all() and (found >= 0).all()
    same = topk_from_logits(student, JSDConfig(0.5, 3, temperature=temperature))
    torch.testing.assert_close(kept_kl(logp, same), 0 * exact, atol=1e-6, rtol=0)


def test_chunked_token_kl_equals_the_dense_one(head, hidden):
    other = nn.Linear(6, 40, bias=False).double()
    p, q = torch.softmax(other(hidden[1]), -1), torch.softmax(head(hidden[0]), -1)
    rows = chunked_token_kl(hidden[1], other, hidden[0], head, chunk_rows=4)
    torch.testing.assert_close(rows, (p * (p / q).log()).sum(-1))
    assert not rows.requires_grad


# ---- sharded head ---------------------------------------------------------------------------


class Scorer(nn.Module):
    """A body and a head; what is computed on the head runs inside forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 40, bias=False)

    def forward(self, x, score):
        return score(self.body(x), self.lm_head)


def sharded_run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check_sharded_gradients()
    gc.collect()  # wrapped modules hold the process group, whose threads must not outlive Python
    dist.barrier()  # no rank leaves while another still communicates
    dist.destroy_process_group()


def check_sharded_gradients() -> None:
    """A sharded head, freed after the forward, gives the gradients of a plain one."""
    torch.manual_seed(0)
    plain = Scorer()
    shard = partial(FSDP, use_orig_params=True, device_id=torch.device("cpu"))
    # Two levels: only a unit below the root is freed between forward and backward.
    sharded = shard(shard(copy.deepcopy(plain)))
    x, config = logits(11, 6, 21, torch.float32), JSDConfig(0.5, 7)
    for module in (plain, sharded):
        with torch.no_grad():
            teacher = module(x + 1, lambda rows, head: teacher_topk(rows, head, config, 4))
        jsd, logprobs = module(
            x,
            lambda rows, head, t=teacher: (
                chunked_jsd(rows, head, t, config, torch.ones(11), 4).loss,
                chunked_logprobs(rows, head, torch.arange(11), chunk_rows=4),
            ),
        )
        (jsd + logprobs.mean()).backward()
    inner = sharded.module
    with FSDP.summon_full_params(inner, with_grads=True):
        for name, parameter in plain.named_parameters():
            grad = inner.module.get_parameter(name).grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-7)
            assert grad.abs().max() > 1e-3


@pytest.mark.dist
def test_chunked_loss_under_a_sharded_head(tmp_path):
    mp.spawn(sharded_run, args=(str(tmp_path / "store"),), nprocs=2)


# ---- row weights ----------------------------------------------------------------------------


def test_trajectory_weights_give_the_mean_of_means():
    sample = torch.tensor([0, 0, 0, 1, 3, 3])
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 4.0, 8.0])
    weights = trajectory_mean_weights(sample, n_trajectories=3)
    assert (weights * values).sum().item() == pytest.approx((3 + 10 + 6) / 3)
    # Split over two ranks the parts add up to the same number.
    parts = [(sample[:4], values[:4]), (sample[4:], values[4:])]
    split = sum((trajectory_mean_weights(s, 3) * v).sum().item() for s, v in parts)
    assert split == pytest.approx((3 + 10 + 6) / 3)
    assert trajectory_mean_weights(torch.zeros(0, dtype=torch.long), 2).shape == (0,)


def test_trajectory_weights_of_some_rows_without_reading_back():
    """What `counted` and `n_local` stand for, spelled out with the rows taken out by hand."""
    sample = torch.tensor([0, 0, 0, 1, 3, 3])
    counted = torch.tensor([True, False, True, False, True, True])
    expected = torch.zeros(6)
    expected[counted] = trajectory_mean_weights(sample[counted], 5)
    for n_local in (None, 4):
        assert torch.equal(trajectory_mean_weights(sample, 5, counted, n_local), expected)
    assert torch.equal(
        trajectory_mean_weights(sample, 5, n_local=4), trajectory_mean_weights(sample, 5)
    )
    with pytest.raises(ValueError, match="n_trajectories=3 but the rows belong to 4"):
        trajectory_mean_weights(sample, 3, n_local=4)


def test_token_weights_give_the_global_token_mean():
    labels = torch.tensor([4, -100, 2, 3])
    assert token_mean_weights(labels).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert token_mean_weights(labels, n_tokens=12).tolist() == pytest.approx(
        [1 / 12, 0, 1 / 12, 1 / 12]
    )
    assert token_mean_weights(torch.tensor([-100, -100])).tolist() == [0.0, 0.0]


# ---- configuration and errors ---------------------------------------------------------------


def test_defaults_are_the_papers():
    defaults = {field.name: field.default for field in fields(JSDConfig)}
    assert defaults == {
        "beta": 0.5,
        "top_k": 256,
        "top_k_mode": "renorm",
        "token_clip": 0.05,
        "clip_mode": "entry",
        "temperature": 1.0,
        "allow_signed_clip": False,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0 with an entry clip of 0.05.*clip_mode"),
        ({"beta": 1.0}, r"beta=1.0 with an entry clip"),
        ({"beta": 1.5}, r"beta=1.5 is outside"),
        ({"beta": float("nan")}, r"beta=nan is outside"),
        ({"top_k": -1}, r"top_k=-1"),
        ({"top_k": 2.5}, r"top_k=2.5"),
        ({"top_k_mode": "softmax"}, r"top_k_mode='softmax'; choose renorm"),
        ({"clip_mode": "position"}, r"clip_mode='position'; choose entry"),
        ({"token_clip": float("nan")}, r"token_clip=nan"),
        ({"temperature": 0.0}, r"temperature=0.0 must be positive"),
    ],
)
def test_config_rejects(wrong, message):
    with pytest.raises(ValueError, match=message):
        JSDConfig(**wrong)


@pytest.mark.parametrize(
    "allowed", [{"clip_mode": "token"}, {"clip_mode": "off"}, {"token_clip": 0}]
)
def test_endpoints_are_accepted_without_an_entry_clip(allowed):
    for beta in (0.0, 1.0):
        assert JSDConfig(beta=beta, **allowed).clips != "entry"


def test_mismatched_rows_are_refused(head, hidden):
    config = JSDConfig(0.5, 7)
    teacher = teacher_topk(hidden[1][:10], head, config)
    with pytest.raises(ValueError, match=r"rows must agree in shape: got \(10,\) and \(11,\)"):
        chunked_jsd(hidden[0], head, teacher, config, torch.ones(11))
    with pytest.raises(ValueError, match="row_weights"):
        chunked_jsd(hidden[0][:10], head, teacher, config, torch.ones(11))
    with pytest.raises(ValueError, match="chunk_rows=0"):
        teacher_topk(hidden[1], head, config, chunk_rows=0)
    with pytest.raises(ValueError, match="n_trajectories=1 but the rows belong to 2"):
        trajectory_mean_weights(torch.tensor([0, 1]), 1)
    with pytest.raises(ValueError, match="n_tokens=0"):
        token_mean_weights(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="student and teacher logits"):
        token_kl(torch.zeros(2, 3), torch.zeros(2, 4))
