"""Scores through the vocabulary head: gradients made in the forward pass, and what they need."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train import projection
from train.losses import (
    JSDConfig,
    chunked_cross_entropy,
    chunked_jsd,
    chunked_logprobs,
    chunked_policy_loss,
    generalized_jsd,
    teacher_topk,
)

ROWS, WIDTH, VOCAB, CHUNK = 11, 6, 40, 4
IDS = torch.tensor([3, -100, 39, 0, 1, -100, 5, 5, 5, 8, 21])


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB).double()


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(1)
    rows = 3 * torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return rows[0].requires_grad_(), rows[1]


def jsd(rows, teacher_rows, head, config=None, chunk_rows=CHUNK):
    config = config or JSDConfig(top_k=7, token_clip=0.02)
    teacher = teacher_topk(teacher_rows, head, config, chunk_rows)
    return chunked_jsd(rows, head, teacher, config, torch.ones(len(rows)), chunk_rows).loss


def policy(rows, teacher_rows, head):
    teacher = torch.linspace(-4, -1, len(rows), dtype=rows.dtype)
    weights = torch.ones(len(rows))
    return chunked_policy_loss(rows, head, teacher, IDS, weights, chunk_rows=CHUNK)


def cross_entropy(rows, teacher_rows, head):
    return chunked_cross_entropy(rows, head, IDS, torch.ones(len(rows)), CHUNK)


def logprobs(rows, teacher_rows, head):
    return chunked_logprobs(rows, head, IDS, 1.3, CHUNK).sum()


LOSSES = [jsd, policy, cross_entropy, logprobs]


# ---- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_only_what_wants_a_gradient_gets_one(head, hidden, loss):
    full = torch.autograd.grad(loss(*hidden, head), [hidden[0], head.weight, head.bias])
    frozen = nn.Linear(WIDTH, VOCAB).double().requires_grad_(False)
    frozen.load_state_dict(head.state_dict())
    torch.testing.assert_close(
        torch.autograd.grad(loss(*hidden, frozen), hidden[0])[0], full[0], rtol=0, atol=0
    )
    of_head = torch.autograd.grad(
        loss(hidden[0].detach(), hidden[1], head), [head.weight, head.bias]
    )
    torch.testing.assert_close(of_head, full[1:], rtol=0, atol=0)
    assert not loss(hidden[0].detach(), hidden[1], frozen).requires_grad
    with torch.no_grad():
        assert not loss(*hidden, head).requires_grad


def test_no_gradient_is_made_that_nobody_wants(head, hidden, monkeypatch):
    made = []
    original = projection._Sweep._project_back

    def noting(sweep, gradient, span, rows, weight, gradients):
        made.append([x is not None for x in gradients])
        original(sweep, gradient, span, rows, weight, gradients)

    monkeypatch.setattr(projection._Sweep, "_project_back", noting)
    with torch.no_grad():
        jsd(*hidden, head)
    jsd(hidden[0].detach(), hidden[1], head.requires_grad_(False))
    assert made == []
    jsd(*hidden, head)
    assert made == [[True, False, False]] * 3  # one per chunk


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_scale_with_the_one_that_comes_in(head, hidden, loss):
    leaves = [hidden[0], head.weight, head.bias]
    once = torch.autograd.grad(loss(*hidden, head), leaves)
    scaled = torch.autograd.grad(-3.0 * loss(*hidden, head), leaves)
    torch.testing.assert_close(scaled, tuple(-3.0 * x for x in once), rtol=1e-12, atol=1e-15)


def test_rows_take_any_weights(head, hidden):
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    leaves = [hidden[0], head.weight, head.bias]
    rows = chunked_logprobs(hidden[0], head, IDS, 1.3, CHUNK)
    found = torch.autograd.grad((weights * rows).sum(), leaves)
    dense = -F.cross_entropy(head(hidden[0]) / 1.3, IDS, reduction="none")
    torch.testing.assert_close(rows, dense, rtol=1e-12, atol=0)
    expected = torch.autograd.grad((weights * dense).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gradients_are_handed_out_once(head, hidden):
    loss = jsd(*hidden, head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()
    for value in (jsd(*hidden, head), logprobs(*hidden, head)):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(value, hidden[0], create_graph=True)


def test_the_weight_keeps_the_gradient_it_was_given(head, hidden, monkeypatch):
    """Not a copy of it: at full size that would be another gigabyte."""
    made = []
    original = projection._add_entries
    monkeypatch.setattr(
        projection, "_add_entries", lambda *a: (made.append(a[0].data_ptr()), original(*a))[1]
    )
    (2 * jsd(*hidden, head)).backward()
    assert set(made) == {head.weight.grad.data_ptr()}


@pytest.mark.parametrize("top_k", [0, 7])
def test_autocast_gives_the_gradients_of_its_narrow_products(top_k):
    """Over float32 masters: as near to the exact gradient as the plain form under autocast."""
    torch.manual_seed(0)
    head, rows = nn.Linear(64, 400, bias=False), torch.randn(2, 24, 64)
    config, errors = JSDConfig(top_k=top_k), {}
    student = rows[0].clone().requires_grad_()
    leaves = [student, head.weight]
    exact = torch.autograd.grad(generalized_jsd(head(student), head(rows[1]), config).sum(), leaves)
    for form in ("plain", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            if form == "plain":
                loss = generalized_jsd(head(student), head(rows[1]).detach(), config).sum()
            else:
                loss = jsd(student, rows[1], head, config, 8)
        grads = torch.autograd.grad(loss, leaves)
        assert [x.dtype for x in grads] == [torch.float32] * 2
        errors[form] = [
            ((x - y).norm() / y.norm()).item() for x, y in zip(grads, exact, strict=True)
        ]
    for ours, plain in zip(errors["chunked"], errors["plain"], strict=True):
        assert 1e-4 < ours < 1.1 * plain


def test_entries_are_added_like_their_table():
    """Ids that meet within a chunk, or not at all, in blocks of columns."""
    generator = torch.Generator().manual_seed(2)
    right = torch.randn(9, 2500, generator=generator, dtype=torch.float64)
    for vocab in (5, 300):
        ids = torch.rand(9, vocab, generator=generator).argsort(-1)[:, :5]
        left = torch.randn(9, 5, generator=generator, dtype=torch.float64)
        total = torch.randn(vocab, 2500, generator=generator, dtype=torch.float64)
        table = torch.zeros(9, vocab, dtype=torch.float64).scatter_(1, ids, left)
        expected = total + table.T @ right
        projection._add_entries(total, ids, left, right)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


# ---- memory ---------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("mode", ["renorm", "tail", "none", "full"])
def test_no_table_of_all_rows_by_the_vocabulary_is_made(mode):
    vocab, width, chunk = 2000, 8, 16
    torch.manual_seed(0)
    head = nn.Linear(width, vocab, bias=False)
    config = JSDConfig(top_k=0) if mode == "full" else JSDConfig(top_k=20, top_k_mode=mode)
    largest = []
    for rows in (64, 256):
        hidden = torch.randn(2, rows, width)
        ids = torch.zeros(rows, dtype=torch.long)
        with Largest() as seen:
            if mode != "full":  # the teacher's table is then what is kept of it
                student = hidden[0].requires_grad_()
                (jsd(student, hidden[1], head, config, chunk)).backward()
            chunked_cross_entropy(hidden[0], head, ids, torch.ones(rows), chunk).backward()
            chunked_logprobs(hidden[0], head, ids, chunk_rows=chunk).sum().backward()
        largest.append(seen.numel)
    assert largest[0] == largest[1] <= chunk * vocab + vocab * width


def test_no_logits_are_kept_for_the_backward_pass(head, hidden):
    """Nor by a single chunk. Tensors that a graph holds are counted by what stands for them."""

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    held = weakref.WeakSet()

    def pack(tensor):
        held.add(stand_in := Held(tensor))
        return stand_in

    for chunk_rows in (CHUNK, ROWS):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda stand_in: stand_in.tensor):
            kept = [
                jsd(*hidden, head, chunk_rows=chunk_rows),
                chunked_cross_entropy(hidden[0], head, IDS, torch.ones(ROWS), chunk_rows),
                chunked_logprobs(hidden[0], head, IDS, chunk_rows=chunk_rows).sum(),
            ]
        shapes = {tuple(x.tensor.shape) for x in held}
        assert shapes <= {(ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (ROWS,), ()}
        assert (VOCAB, WIDTH) in shapes  # of the log-probs, which project again
        sum(kept).backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for():
    torch.manual_seed(0)
    head = nn.Linear(64, 4000, bias=False).cuda()
    rows = torch.randn(2, 300, 64, device="cuda")
    student, weights = rows[0].requires_grad_(), torch.ones(300, device="cuda")
    config = JSDConfig(top_k=16)

    def step():
        teacher = teacher_topk(rows[1], head, config)
        chunked_jsd(student, head, teacher, config, weights).loss.backward()

    step()  # what libraries set up at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
