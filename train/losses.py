"""Training losses over completion rows: JSD, reverse-KL policy loss, cross-entropy, row weights.

Hidden states are projected to the vocabulary a few rows at a time (`train.projection`), so memory
does not grow with the length of the completions.
The divergences themselves are in `train.divergence`; the names used elsewhere are re-exported here.

Shapes: R completion rows, C rows of one chunk, V vocabulary, K kept (top-k) entries, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.divergence import (
    IGNORE_INDEX,
    JSDConfig,
    TeacherTopK,
    aligned_entries,
    check_teacher,
    clipped_rows,
    divergence_from_logprobs,
    entries_kl,
    entry_logprobs,
    full_logprobs,
    generalized_jsd,
    jsd_rows,
    kept_kl,
    kept_logprobs,
    row_statistics,
    same_shape,
    token_kl,
    token_logprobs,
    topk_from_logits,
)
from train.projection import (
    CHUNK_ROWS,
    Score,
    chunks,
    collect,
    projection,
    row_values,
    weighted_sum,
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
    project = projection(hidden_rows, lm_head)
    parts = (topk_from_logits(project(rows), config) for rows in chunks(hidden_rows, chunk_rows))
    tables = ((part.logprobs,) if part.ids is None else (part.logprobs, part.ids) for part in parts)
    logprobs, *ids = collect(tables, len(hidden_rows))
    return TeacherTopK(ids[0] if ids else None, logprobs)


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
    check_teacher(hidden_rows.shape[0], teacher)
    same_shape("row_weights and rows", row_weights.shape, hidden_rows.shape[:1])
    # Renormalised over the kept entries, the loss depends on no other logit.
    ids = teacher.ids if config.top_k_mode == "renorm" else None
    score = _full_score(teacher, config) if teacher.ids is None else _kept_score(teacher, config)
    return DistillOutput(*weighted_sum(hidden_rows, lm_head, score, row_weights, chunk_rows, ids))


def _full_score(teacher: TeacherTopK, config: JSDConfig) -> Score:
    """The whole vocabulary is compared; columns in the order of `DistillOutput`."""

    def score(logits: Tensor, entries: Tensor, span: slice) -> tuple[Tensor, ...]:
        kept = teacher.rows(span)
        logp = full_logprobs(entries, config.temperature)
        row_jsd, clipped = clipped_rows(logp, kept.logprobs, kept, config)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
            return row_jsd, kept_kl(logp, kept), entropy, torch.zeros_like(entropy), clipped

    return score


def _kept_score(teacher: TeacherTopK, config: JSDConfig) -> Score:
    """The teacher's kept entries are compared; columns in the order of `DistillOutput`."""

    def score(logits: Tensor, entries: Tensor, span: slice) -> tuple[Tensor, ...]:
        kept, vocab_size = teacher.rows(span), logits.shape[-1]
        statistics = row_statistics(logits, config.temperature, entropy=True)
        if config.top_k_mode == "renorm":
            logp = entry_logprobs(entries, statistics, config)
        else:
            logp = kept_logprobs(entries, kept.ids, statistics, config)
        pair = aligned_entries(logp, kept, config, vocab_size)
        row_jsd, clipped = clipped_rows(*pair, kept, config)
        with torch.no_grad():
            outside = -torch.expm1(torch.logsumexp(logp, dim=-1).clamp(max=0))
            return row_jsd, entries_kl(logp, kept), statistics.entropy[:, 0], outside, clipped

    return score


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

    def score(logits: Tensor, entries: Tensor, span: slice) -> tuple[Tensor, ...]:
        return (token_logprobs(entries, ids[span], temperature),)

    return row_values(hidden_rows, lm_head, score, chunk_rows)


def chunked_cross_entropy(
    hidden_rows: Tensor,
    lm_head: nn.Linear,
    labels: Tensor,
    row_weights: Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Sum over rows of row_weights (R,) * cross-entropy of labels (R,); label -100 counts zero."""
    same_shape("labels and rows", labels.shape, hidden_rows.shape[:1])
    same_shape("row_weights and rows", row_weights.shape, hidden_rows.shape[:1])

    def score(logits: Tensor, entries: Tensor, span: slice) -> tuple[Tensor, ...]:
        return (-token_logprobs(entries, labels[span]),)

    return weighted_sum(hidden_rows, lm_head, score, row_weights, chunk_rows)[0]


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
    teacher_project = projection(teacher_rows, teacher_head)
    student_project = projection(student_rows, student_head)
    pairs = zip(chunks(teacher_rows, chunk_rows), chunks(student_rows, chunk_rows), strict=True)
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
    same_shape("ids and rows", sampled_ids.shape, hidden_rows.shape[:1])
    same_shape("row_weights and rows", row_weights.shape, hidden_rows.shape[:1])
    same_shape("teacher log-probs and rows", teacher_logprobs.shape, hidden_rows.shape[:1])

    def score(logits: Tensor, entries: Tensor, span: slice) -> tuple[Tensor, ...]:
        student = token_logprobs(entries, sampled_ids[span], temperature)
        return (policy_rows(student, teacher_logprobs[span]),)

    return weighted_sum(hidden_rows, lm_head, score, row_weights, chunk_rows)[0]


def trajectory_mean_weights(
    sample_index: Tensor,
    n_trajectories: int,
    counted: Tensor | None = None,
    n_local: int | None = None,
) -> Tensor:
    """Weights (R,) with which a sum over rows is the mean of per-trajectory means (Eq. 7).

    sample_index (R,): trajectory of each row, from 0; all rows of a trajectory must be present.
    n_trajectories: trajectories of the whole optimizer step, over all packs and ranks.
    counted (R,): rows that take part in the means; the others get weight 0. By default all.
    n_local: how many of them `sample_index` numbers. Given, nothing is read back from the device.
    """
    if counted is None:
        counted = torch.ones_like(sample_index, dtype=torch.bool)
    present = n_local
    if n_local is None:
        n_local = int(sample_index.max()) + 1 if len(sample_index) else 0
        present = len(sample_index[counted].unique())
    if n_trajectories < max(present, 1):
        raise ValueError(
            f"n_trajectories={n_trajectories} but the rows belong to {present} trajectories; "
            "give the number in the whole optimizer step"
        )
    counted = counted.to(torch.float32)
    counts = counted.new_zeros(n_local).index_add_(0, sample_index, counted)
    return counted / (n_trajectories * counts.clamp(min=1)[sample_index])


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
