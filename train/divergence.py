"""Divergences between next-token distributions, on logits: the generalized JSD and the KL.

All of them sum the pointwise terms of `divergence_from_logprobs`: there is one divergence for
training and for evaluation. `train.losses` applies them to hidden states.

Shapes: R completion rows, C rows of one chunk, V vocabulary, K kept (top-k) entries.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss
# Rows whose float32 tables are made at once: they stay in a processor's cache; on a GPU few
# launches count for more.
STATISTICS_ROWS_CPU, STATISTICS_ROWS = 8, 32


@dataclass(frozen=True)
class JSDConfig:
    """How teacher and student distributions are compared (Eq. 7 and its clip).

    beta: weight of the teacher in the mixture. 0 means KL(teacher || student), 1 means
        KL(student || teacher): the scaled limits, since Eq. 7 itself vanishes at both ends.
    top_k: teacher entries kept per row; 0, or anything from V upwards, keeps the whole vocabulary.
    top_k_mode: "renorm" renormalises both sides over the kept entries; "tail" adds one bucket with
        the remaining mass of each side; "none" sums the terms of the kept entries only. The latter
        are not distributions any more, so at beta 0 and 1 each term carries the mass difference
        of the generalized KL, p log(p/q) - p + q, and stays non-negative.
    token_clip: upper limit, in nats before the tau**2 factor; 0 or less switches it off.
    clip_mode: "entry" limits each (row, vocabulary entry) term, "token" each row's divergence.
    temperature: tau of both softmaxes; row divergences are multiplied by tau**2.
    allow_signed_clip: accept an entry clip at beta 0 or 1, where the loss can go negative.
    """

    beta: float = 0.5
    top_k: int = 256
    top_k_mode: Literal["renorm", "tail", "none"] = "renorm"
    token_clip: float = 0.05
    clip_mode: Literal["entry", "token", "off"] = "entry"
    temperature: float = 1.0
    allow_signed_clip: bool = False

    def __post_init__(self):
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta} is outside [0, 1]; 0.5 is the symmetric JSD")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(
                f"top_k={self.top_k!r} is not a count; use 0 for the full vocabulary or K > 0"
            )
        if self.top_k_mode not in ("renorm", "tail", "none"):
            raise ValueError(f"top_k_mode={self.top_k_mode!r}; choose renorm, tail or none")
        if self.clip_mode not in ("entry", "token", "off"):
            raise ValueError(f"clip_mode={self.clip_mode!r}; choose entry, token or off")
        if math.isnan(self.token_clip):
            raise ValueError("token_clip=nan; give a limit in nats, or 0 to switch the clip off")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature} must be positive; 1.0 is the default")
        if self.clips == "entry" and self.beta in (0.0, 1.0) and not self.allow_signed_clip:
            raise ValueError(
                f"beta={self.beta} with an entry clip of {self.token_clip}: the terms of a plain "
                "KL have both signs and only the positive ones would be clipped, so the loss could "
                "go negative; use clip_mode='token' or 'off', or a beta strictly between 0 and 1"
            )

    @property
    def clips(self) -> Literal["entry", "token", "off"]:
        """The clip that is in force: "off" also when token_clip is 0 or less."""
        return self.clip_mode if self.token_clip > 0 else "off"

    def kept(self, vocab_size: int) -> int:
        """Number of entries kept per row out of `vocab_size`; V when top-k is off or too large."""
        return min(self.top_k, vocab_size) if self.top_k > 0 else vocab_size


@dataclass(frozen=True)
class TeacherTopK:
    """What the teacher forward leaves behind: full-vocabulary log-probs of the kept entries."""

    ids: Tensor | None  # (R, K) int64; None when the whole vocabulary is kept (then K = V)
    logprobs: Tensor  # (R, K) at temperature tau, float32 or wider, no gradient

    def rows(self, span: slice) -> "TeacherTopK":
        """What belongs to the rows of `span`."""
        return TeacherTopK(None if self.ids is None else self.ids[span], self.logprobs[span])


@dataclass(frozen=True)
class RowStatistics:
    """What a softmax at temperature tau takes from the whole row; float32 or wider, no gradient."""

    peak: Tensor  # (R, 1) largest logit
    log_total: Tensor  # (R, 1) log of the sum of exp((logit - peak) / tau)
    entropy: Tensor | None  # (R, 1) nats; None where it was not asked for


def divergence_from_logprobs(
    student_logp: Tensor, teacher_logp: Tensor, beta: float, normalised: bool = True
) -> Tensor:
    """Pointwise terms (..., K) of the generalized JSD (Eq. 7); their sum over K is the divergence.

    Both inputs are log-probabilities of the same entries; only the student receives a gradient.
    Equal inputs give exactly zero terms, and for 0 < beta < 1 an exactly zero gradient.
    `normalised=False` is for entries that do not sum to one (see `JSDConfig.top_k_mode`).
    """
    teacher_logp = teacher_logp.detach()
    if beta == 0.0:
        terms = teacher_logp.exp() * (teacher_logp - student_logp)
        return terms if normalised else terms - teacher_logp.exp() + student_logp.exp()
    if beta == 1.0:
        terms = student_logp.exp() * (student_logp - teacher_logp)
        return terms if normalised else terms - student_logp.exp() + teacher_logp.exp()
    with torch.no_grad():  # m = beta p_T + (1 - beta) p_S, through the log-ratio to stay exact at 0
        gap = teacher_logp - student_logp
        low = torch.log1p(beta * torch.expm1(gap.clamp(max=0)))  # log m - log p_S where gap <= 0
        high = torch.log1p((1 - beta) * torch.expm1(-gap.clamp(min=0)))  # log m - log p_T above 0
        student_ratio = torch.where(gap <= 0, -low, -gap - high)  # log p_S / m
        teacher_ratio = torch.where(gap <= 0, gap - low, -high)  # log p_T / m
        teacher_part = beta * teacher_logp.exp() * teacher_ratio
    # The derivative of a whole term with respect to log p_S is (1 - beta) p_S log(p_S / m): what m
    # contributes cancels the 1 of d(x log x) entry by entry, so the ratio may be held constant.
    return teacher_part + (1 - beta) * student_logp.exp() * student_ratio


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, config: JSDConfig) -> Tensor:
    """Row divergences (R,) from two (R, V) logit tables; plain form without chunks."""
    same_shape("student and teacher logits", student_logits.shape, teacher_logits.shape)
    return jsd_rows(student_logits, topk_from_logits(teacher_logits, config), config)


def jsd_rows(student_logits: Tensor, teacher: TeacherTopK, config: JSDConfig) -> Tensor:
    """Row divergences (R,) of student logits (R, V) from the teacher's kept entries."""
    check_teacher(student_logits.shape[0], teacher)
    rows, _ = clipped_rows(*aligned_logprobs(student_logits, teacher, config), teacher, config)
    return rows


def token_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) per row (R,) over the full vocabulary, float32 or wider (Eq. 4)."""
    same_shape("student and teacher logits", student_logits.shape, teacher_logits.shape)
    teacher_logp = F.log_softmax(at_least_float32(teacher_logits), dim=-1)
    return divergence_from_logprobs(
        F.log_softmax(at_least_float32(student_logits), dim=-1), teacher_logp, beta=0.0
    ).sum(-1)


def kept_kl(student_logp: Tensor, teacher: TeacherTopK) -> Tensor:
    """KL(teacher || student) per row (R,) over the teacher's kept entries and a bucket of the rest.

    student_logp (R, V): full log-probs at the teacher's temperature. Pooling entries can only lower
    a KL: this is `token_kl` where all are kept, and never more.
    """
    if teacher.ids is None:
        return divergence_from_logprobs(student_logp, teacher.logprobs, beta=0.0).sum(-1)
    return entries_kl(student_logp.gather(-1, teacher.ids), teacher)


def entries_kl(student_logp: Tensor, teacher: TeacherTopK) -> Tensor:
    """`kept_kl` (R,) from the student's full-vocabulary log-probs (R, K) of the kept entries."""
    ours, theirs = _with_tail(student_logp), _with_tail(teacher.logprobs)
    return divergence_from_logprobs(ours, theirs, beta=0.0).sum(-1)


def aligned_logprobs(
    student_logits: Tensor, teacher: TeacherTopK, config: JSDConfig
) -> tuple[Tensor, Tensor]:
    """Student and teacher log-probs over the same entries, as `top_k_mode` defines them."""
    if teacher.ids is None:
        return full_logprobs(student_logits, config.temperature), teacher.logprobs
    student_logp = kept_logprobs(
        student_logits, teacher.ids, row_statistics(student_logits, config.temperature), config
    )
    return aligned_entries(student_logp, teacher, config, student_logits.shape[-1])


def aligned_entries(
    student_logp: Tensor, teacher: TeacherTopK, config: JSDConfig, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """`aligned_logprobs` from the student's log-probs (C, K) of the kept entries, over all."""
    if config.top_k_mode == "renorm":
        return F.log_softmax(student_logp, dim=-1), F.log_softmax(teacher.logprobs, dim=-1)
    if config.top_k_mode == "tail" and teacher.ids.shape[1] < vocab_size:
        return _with_tail(student_logp), _with_tail(teacher.logprobs)
    return student_logp, teacher.logprobs


def clipped_rows(
    student_logp: Tensor, teacher_logp: Tensor, teacher: TeacherTopK, config: JSDConfig
) -> tuple[Tensor, Tensor]:
    """Row divergences (C,) after clip and tau**2, and the share of clipped terms (C,)."""
    normalised = teacher.ids is None or config.top_k_mode != "none"
    terms = divergence_from_logprobs(student_logp, teacher_logp, config.beta, normalised)
    limit, scale = config.token_clip, config.temperature**2
    if config.clips == "entry":
        clipped = (terms.detach() > limit).to(terms.dtype).mean(-1)
        return scale * terms.clamp(max=limit).sum(-1), clipped
    rows = terms.sum(-1)
    if config.clips == "token":
        clipped = (rows.detach() > limit).to(terms.dtype)
        return scale * rows.clamp(max=limit), clipped
    return scale * rows, torch.zeros_like(rows)


@torch.no_grad()
def topk_from_logits(logits: Tensor, config: JSDConfig) -> TeacherTopK:
    """Keep each row's `top_k` largest logits (R, V) as full-vocabulary log-probs; no gradient."""
    k = config.kept(logits.shape[-1])
    if k == logits.shape[-1]:
        return TeacherTopK(None, full_logprobs(logits, config.temperature))
    ids = logits.topk(k, dim=-1).indices  # (R, K)
    statistics = row_statistics(logits, config.temperature)
    return TeacherTopK(ids, kept_logprobs(logits, ids, statistics, config))


def full_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs over the whole vocabulary at `temperature`, same shape as the logits."""
    return F.log_softmax(at_least_float32(logits) / temperature, dim=-1)


@torch.no_grad()
def row_statistics(logits: Tensor, temperature: float, entropy: bool = False) -> RowStatistics:
    """What the softmax of each row of (R, V) logits at `temperature` rests on; no gradient."""
    size = STATISTICS_ROWS_CPU if logits.device.type == "cpu" else STATISTICS_ROWS
    peak = at_least_float32(logits.amax(-1, keepdim=True))  # (R, 1)
    log_total, means = torch.empty_like(peak), torch.empty_like(peak)
    # Two tables for all parts: made anew for each, they would scatter a CPU's memory.
    tables = peak.new_empty(2, min(size, len(logits)), logits.shape[-1])
    for start in range(0, len(logits), size):
        span = slice(start, start + size)
        scaled, weights = tables[:, : len(logits[span])]
        scaled.copy_(logits[span]).sub_(peak[span])
        if temperature != 1.0:  # a division by 1 would read and write the table
            scaled /= temperature
        torch.exp(scaled, out=weights)
        total = weights.sum(-1, keepdim=True)
        log_total[span] = total.log()
        if entropy:
            means[span] = weights.mul_(scaled).sum(-1, keepdim=True) / total
    return RowStatistics(peak, log_total, log_total - means if entropy else None)


def kept_logprobs(
    logits: Tensor, ids: Tensor, statistics: RowStatistics, config: JSDConfig
) -> Tensor:
    """Full-vocabulary log-probs (C, K) of the entries `ids` of the logits (C, V), differentiable.

    Renormalising removes the full-vocabulary normaliser again, so there it has no gradient; it is
    subtracted so that both sides round alike.
    """
    logp = entry_logprobs(logits.gather(-1, ids), statistics, config)
    if config.top_k_mode == "renorm" or not (torch.is_grad_enabled() and logits.requires_grad):
        return logp
    scaled = (at_least_float32(logits) - statistics.peak) / config.temperature  # (C, V)
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    # Its value is taken from the statistics, as the teacher's is: equal sides differ by exactly 0.
    return logp - (normaliser - normaliser.detach())


def entry_logprobs(entries: Tensor, statistics: RowStatistics, config: JSDConfig) -> Tensor:
    """Full-vocabulary log-probs (C, K) of single logits (C, K), their normaliser held constant."""
    # Measured from the row's largest logit: log-probs then round by their own size.
    scaled = (at_least_float32(entries) - statistics.peak) / config.temperature
    return scaled - statistics.log_total


def _with_tail(logp: Tensor) -> Tensor:
    """Append log(1 - sum of probabilities) to (C, K) log-probs, giving (C, K + 1).

    The remaining mass is not resolved below the machine epsilon; there it is held at that floor
    on both sides and has no gradient.
    """
    eps = torch.finfo(logp.dtype).eps
    inside = torch.logsumexp(logp, dim=-1, keepdim=True).clamp(max=-eps)
    return torch.cat([logp, torch.log(-torch.expm1(inside))], dim=-1)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs (R,) of `ids` (R,) under logits (R, V) / temperature; 0 where the id is -100."""
    scaled = at_least_float32(logits)
    if temperature != 1.0:  # a division by 1 would copy the table
        scaled = scaled / temperature
    return -F.cross_entropy(scaled, ids, reduction="none", ignore_index=IGNORE_INDEX)


def at_least_float32(x: Tensor) -> Tensor:
    """At least float32; float64 stays, so that gradients can be checked numerically."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def same_shape(what: str, first: torch.Size, second: torch.Size) -> None:
    if first != second:
        raise ValueError(f"{what} must agree in shape: got {tuple(first)} and {tuple(second)}")


def check_teacher(rows: int, teacher: TeacherTopK) -> None:
    """The teacher's table belongs to `rows` rows and its ids to its log-probs."""
    same_shape("teacher and student rows", teacher.logprobs.shape[:1], torch.Size([rows]))
    if teacher.ids is not None:
        same_shape("teacher ids and log-probs", teacher.ids.shape, teacher.logprobs.shape)
