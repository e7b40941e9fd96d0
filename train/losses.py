"""Training losses over completion rows: JSD, reverse-KL policy loss, cross-entropy, row weights.

Hidden states are projected to the vocabulary a few rows at a time, and the logits are computed
again in the backward pass, so memory does not grow with the length of the completions.
The divergences themselves are in `train.divergence`; the names used elsewhere are re-exported here.

Shapes: R completion rows, C rows of one chunk, V vocabulary, K kept (top-k) entries, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.divergence import (
    IGNORE_INDEX,
    JSDConfig,
    TeacherTopK,
    aligned_logprobs,
    check_teacher,
    clipped_rows,
    divergence_from_logprobs,
    full_logprobs,
    generalized_jsd,
    jsd_rows,
    kept_kl,
    same_shape,
    token_kl,
    token_logprobs,
    topk_from_logits,
)

__all__ = [
    "CHUNK_ROWS",
    "DistillOutput",
    "IGNORE_INDEX",
    "JSDConfig",
    "TeacherTopK",
    "chunked_cross_entropy",
    "chunked_jsd",
    "chunked_logprobs",
    "chunked_policy_loss",
    "chunked_token_kl",
    "divergence_from_logprobs",
    "generalized_jsd",
    "jsd_rows",
    "kept_kl",
    "policy_rows",
    "teacher_topk",
    "token_kl",
    "token_logprobs",
    "token_mean_weights",
    "topk_from_logits",
    "trajectory_mean_weights",
]

CHUNK_ROWS = 256  # rows projected at once; 256 x 152k logits are 156 MB in float32


@dataclass(frozen=True)
class DistillOutput:
    """Weighted loss (with gradient) and per-row diagnostics (without)."""

    loss: Tensor  # () sum over rows of row_weight * row divergence
    row_jsd: Tensor  # (R,) nats, tau**2 included
    row_kl: Tensor  # (R,) nats at tau, neither clipped nor renormalised; see `kept_kl`
    student_entropy: Tensor  # (R,) nats, full vocabulary at tau
    mass_outside: Tensor  # (R,) student probability outside the teacher's kept entries
    clipped_share: Tensor  # (R,) share of the row's terms at the clip (token clip: 0 or 1)


@torch.no_grad()
def teacher_topk(
    hidden_rows: Tensor, lm_head: nn.Linear, config: JSDConfig, chunk_rows: int = CHUNK_ROWS
) -> TeacherTopK:
    """Teacher side of the JSD from hidden states (R, D), a chunk of rows at a time; no gradient."""
    project = _projection(hidden_rows, lm_head)
    parts = [topk_from_logits(project(rows), config) for rows in _chunks(hidden_rows, chunk_rows)]
    ids = None if parts[0].ids is None else torch.cat([part.ids for part in parts])
    return TeacherTopK(ids, torch.cat([part.logprobs for part in parts]))


def chunked_jsd(
    hidden_rows: Tensor,
    lm_head: nn.Linear,
    teacher: TeacherTopK,
    config: JSDConfig,
    row_weights: Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> DistillOutput:
    """Weighted JSD of the student's hidden states (R, D) from the teacher's kept entries.

    loss = sum over rows of row_weights (R,) * row divergence; see `trajectory_mean_weights`.
    Gradients reach `hidden_rows` and `lm_head`. Zero rows give a zero loss with a graph.
    """
    rows_total = hidden_rows.shape[0]
    check_teacher(rows_total, teacher)
    same_shape("row_weights and rows", row_weights.shape, hidden_rows.shape[:1])
    project = _projection(hidden_rows, lm_head)
    diagnostics: dict[int, tuple[Tensor, ...]] = {}

    def score(rows: Tensor, start: int) -> Tensor:
        logits = project(rows)
        span = slice(start, start + rows.shape[0])
        ids = None if teacher.ids is None else teacher.ids[span]
        kept = TeacherTopK(ids, teacher.logprobs[span])
        row_jsd, clipped = clipped_rows(*aligned_logprobs(logits, kept, config), kept, config)
        if start not in diagnostics:  # the recomputation in the backward pass skips this
            watched = _student_diagnostics(logits, kept, config.temperature)
            diagnostics[start] = (*watched, clipped)
        return row_jsd

    row_jsd = _map_rows(score, hidden_rows, chunk_rows)
    kl, entropy, outside, clipped = (
        torch.cat([diagnostics[start][i] for start in sorted(diagnostics)]) for i in range(4)
    )
    loss = (row_weights.to(row_jsd.dtype) * row_jsd).sum()
    return DistillOutput(loss, row_jsd.detach(), kl, entropy, outside, clipped)


def chunked_logprobs(
    hidden_rows: Tensor,
    lm_head: nn.Linear,
    ids: Tensor,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Log-probs (R,) of `ids` (R,) under the full vocabulary at `temperature`; differentiable.

    Rows whose id is -100 give exactly 0 and no gradient.
    """
    same_shape("ids and rows", ids.shape, hidden_rows.shape[:1])
    project = _projection(hidden_rows, lm_head)

    def score(rows: Tensor, start: int) -> Tensor:
        return token_logprobs(project(rows), ids[start : start + rows.shape[0]], temperature)

    return _map_rows(score, hidden_rows, chunk_rows)


def chunked_cross_entropy(
    hidden_rows: Tensor,
    lm_head: nn.Linear,
    labels: Tensor,
    row_weights: Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Sum over rows of row_weights (R,) * cross-entropy of labels (R,); label -100 counts zero."""
    logprobs = chunked_logprobs(hidden_rows, lm_head, labels, chunk_rows=chunk_rows)
    return -(row_weights.to(logprobs.dtype) * logprobs).sum()


@torch.no_grad()
def chunked_token_kl(
    teacher_rows: Tensor,
    teacher_head: nn.Linear,
    student_rows: Tensor,
    student_head: nn.Linear,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """`token_kl` (R,) from the hidden states (R, D) of both sides, without (R, V) tables."""
    same_shape("teacher and student rows", teacher_rows.shape[:1], student_rows.shape[:1])
    teacher_project = _projection(teacher_rows, teacher_head)
    student_project = _projection(student_rows, student_head)
    pairs = zip(_chunks(teacher_rows, chunk_rows), _chunks(student_rows, chunk_rows), strict=True)
    return torch.cat([token_kl(teacher_project(t), student_project(s)) for t, s in pairs])


def policy_rows(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Reverse-KL policy loss per row (R,) from the log-probs of the sampled tokens.

    The advantage log p_T - log p_S of each sampled token is a constant; its policy gradient is
    that of KL(student || teacher) estimated at the sample. The value is not a divergence and has
    either sign; no tau**2 factor.
    """
    same_shape("student and teacher log-probs", student_logprobs.shape, teacher_logprobs.shape)
    advantage = (teacher_logprobs - student_logprobs).detach()
    return -advantage * student_logprobs


def chunked_policy_loss(
    hidden_rows: Tensor,
    lm_head: nn.Linear,
    teacher_logprobs: Tensor,
    sampled_ids: Tensor,
    row_weights: Tensor,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Sum of row_weights (R,) * `policy_rows` at `sampled_ids` (R,); id -100 counts zero.

    `teacher_logprobs` (R,) come from `chunked_logprobs` of the teacher at the same temperature.
    """
    student = chunked_logprobs(hidden_rows, lm_head, sampled_ids, temperature, chunk_rows)
    return (row_weights.to(student.dtype) * policy_rows(student, teacher_logprobs)).sum()


def trajectory_mean_weights(sample_index: Tensor, n_trajectories: int) -> Tensor:
    """Weights (R,) with which a sum over rows is the mean of per-trajectory means (Eq. 7).

    sample_index (R,): trajectory of each row, from 0; all rows of a trajectory must be present.
    n_trajectories: trajectories of the whole optimizer step, over all packs and ranks.
    """
    counts = torch.bincount(sample_index)
    present = int((counts > 0).sum())
    if n_trajectories < max(present, 1):
        raise ValueError(
            f"n_trajectories={n_trajectories} but the rows belong to {present} trajectories; "
            "give the number in the whole optimizer step"
        )
    return 1.0 / (n_trajectories * counts[sample_index].to(torch.float32))


def token_mean_weights(labels: Tensor, n_tokens: int | None = None) -> Tensor:
    """Weights (R,) of a mean over the rows whose label is not -100.

    n_tokens: the global number of such rows; by default that of `labels` (all masked: zeros).
    """
    counted = (labels != IGNORE_INDEX).to(torch.float32)
    if n_tokens is None:
        return counted / counted.sum().clamp(min=1)
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens}; a mean needs at least one row with a label")
    return counted / n_tokens


@torch.no_grad()
def _student_diagnostics(
    logits: Tensor, teacher: TeacherTopK, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (C,) from the teacher, the student's entropy (C,), its probability (C,) outside the kept
    entries.
    """
    logp = full_logprobs(logits, temperature)
    kl, entropy = kept_kl(logp, teacher), -(logp.exp() * logp).sum(-1)
    if teacher.ids is None:
        return kl, entropy, torch.zeros_like(entropy)
    inside = torch.logsumexp(logp.gather(-1, teacher.ids), dim=-1)
    return kl, entropy, -torch.expm1(inside.clamp(max=0))


def _projection(hidden_rows: Tensor, lm_head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Hidden states to logits, in the wider dtype of the two; under autocast in its dtype.

    So training in bfloat16 has bfloat16 logits, sharded (narrow states and gathered weights) or not
    (autocast); every softmax over them is float32. They are 0.06 to 0.125 apart at the usual
    magnitudes: where that matters, hand over float32 hidden states without autocast. The weight is
    then converted once, not once per chunk.
    """
    dtype = torch.promote_types(hidden_rows.dtype, lm_head.weight.dtype)
    weight = lm_head.weight.to(dtype)
    bias = None if lm_head.bias is None else lm_head.bias.to(dtype)
    return lambda rows: F.linear(rows.to(dtype), weight, bias)


def _map_rows(score: Callable[[Tensor, int], Tensor], rows: Tensor, chunk_rows: int) -> Tensor:
    """score(chunk, start) -> (C,) over all chunks, concatenated; recomputed for the backward pass.

    A single chunk is scored directly: recomputing it would cost time and save nothing at its peak.
    """
    chunks = _chunks(rows, chunk_rows)
    if len(chunks) == 1:
        return score(rows, 0)
    parts = [
        # No random numbers in here, so no generator state needs to be kept.
        checkpoint(score, chunk, i * chunk_rows, use_reentrant=False, preserve_rng_state=False)
        for i, chunk in enumerate(chunks)
    ]
    return torch.cat(parts)


def _chunks(rows: Tensor, chunk_rows: int) -> tuple[Tensor, ...]:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1; {CHUNK_ROWS} is the default")
    return rows.split(chunk_rows)  # one empty chunk when there are no rows
