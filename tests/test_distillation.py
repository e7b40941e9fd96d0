"""The objective of one micro batch on logits that are parameters: values and gradients by hand."""

import pytest
import torch
from torch import nn

from modeling.generation import Rollout, Round
from modeling.sequence import Text
from modeling.tokenizer import SpecialTokens
from train import opsd
from train.config import DistillArguments
from train.rollout import Prompt, Trajectory
from train.teacher import FixedTeacher

CPU = torch.device("cpu")
TOKENS = SpecialTokens(0, 1, 2, 3)


class Table(nn.Module):
    """A model whose logits are its parameters."""

    def __init__(self, rows: int, vocab: int, seed: int):
        super().__init__()
        values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(2 * values)
        self.lm_head = nn.Linear(vocab, vocab, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(vocab))

    def forward(self, batch, head):
        return head(self.logits, self.lm_head)


def written(row: int, *rounds: tuple[tuple[int, ...], str]) -> Trajectory:
    context = [Text((7, 8))]
    parts = tuple(Round(ids, ended_by, ()) for ids, ended_by in rounds)
    return Trajectory(Prompt(row, context, [*context, Text((9,))], 9), Rollout(parts))


CLOSED = written(0, ((4, 5), "eos"))  # rows predict 4 5 <eos>
CUT_OFF = written(
    1, ((6,), "eos"), ((4, 5, 6), "budget")
)  # 6 <eos> | 4 5 6 (<eos> was not sampled)
LABELS = [4, 5, 1, 6, 1, 4, 5, 6]
CUT_ROW = 8


def table_step(seed=0, micro=(CLOSED, CUT_OFF), count=2, **distill):
    rows = sum(len(r.token_ids) + 1 for t in micro for r in t.rollout.rounds)
    student, teacher = Table(rows, 11, seed), Table(rows, 11, seed + 1)
    frozen = FixedTeacher(Table(rows, 11, seed + 1))
    frozen.module = teacher  # trainable, to see that nothing arrives
    config = DistillArguments(**distill)
    scored = opsd.distillation(student, frozen, list(micro), count, config, TOKENS, CPU)
    scored["loss"].backward()
    assert teacher.logits.grad is None
    return float(scored["loss"].detach()), student.logits, teacher.logits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_policy_gradient_is_the_closed_form(temperature):
    loss, student, teacher = table_step(jsd_loss_kind="tinker", jsd_temperature=temperature)
    logp = (student.detach().double() / temperature).log_softmax(-1)
    logq = (teacher.detach().double() / temperature).log_softmax(-1)
    labels = torch.tensor(LABELS)
    weight = torch.tensor([1 / 6] * 3 + [1 / 10] * 5).double()  # 1 / (trajectories * rows)
    picked, rows = logp[torch.arange(8), labels], torch.arange(8)
    advantage = logq[rows, labels] - picked
    assert loss == pytest.approx(float(-(weight * advantage * picked).sum()), rel=1e-5)
    onehot = nn.functional.one_hot(labels, 11)
    expected = (weight * -advantage)[:, None] * (onehot - logp[:8].exp()) / temperature
    torch.testing.assert_close(student.grad[:8].double(), expected, rtol=1e-5, atol=1e-7)
    assert not student.grad[CUT_ROW].any()


def test_cross_entropy_leaves_out_the_closing_token_that_was_cut_off():
    loss, student, _ = table_step(jsd_weight=0.0, ce_weight=1.0)
    nll = nn.functional.cross_entropy(
        student.detach()[:8].double(), torch.tensor(LABELS), reduction="none"
    )
    assert loss == pytest.approx(float((nll[:3].mean() + nll[3:].mean()) / 2), rel=1e-5)
    assert not student.grad[CUT_ROW].any()
    assert student.grad[[2, 4]].abs().sum(-1).min() > 0.01  # closing tokens that were sampled


def test_divergence_counts_every_row_of_the_sampled_context():
    loss, student, teacher = table_step(jsd_top_k=0, jsd_token_clip=0)
    p, q = student.detach().double().softmax(-1), teacher.detach().double().softmax(-1)
    m = (p + q) / 2
    rows = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert loss == pytest.approx(float((rows[:3].mean() + rows[3:].mean()) / 2), rel=1e-5)
    assert student.grad.abs().sum(-1).min() > 1e-4


def test_a_share_of_a_step_counts_by_the_trajectories_of_the_step():
    whole, *_ = table_step(micro=(CLOSED,), count=1)
    share, *_ = table_step(micro=(CLOSED,), count=4)
    assert share == pytest.approx(whole / 4, rel=1e-6)
