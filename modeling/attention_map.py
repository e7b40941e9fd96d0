"""Where tokens look: the attention of a packed forward, summed by what is looked at.

A plan is wrapped: it still computes the attention, and beside it the probabilities of some query
rows are computed once more, softmax(q k^T / sqrt(E)) under the same mask, and summed over the keys
of each source. Whether these probabilities are those of the plan is not taken for granted: times v
they have to give its output.

Query rows are taken by parts, so that memory grows with the sequence, not with its square.

Legend: T packed tokens, R query rows of a part, H heads, K kv-heads, G = H / K, E head_dim, P
groups of query rows, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling.attention import Plan, packed_plan
from modeling.bagel import Bagel
from modeling.qwen2_mot import Route
from modeling.sequence import PackedBatch, Split

MAX_SCORES = 1 << 25  # numbers of a part's (H, R, T): 128 MiB


class AttentionMismatchError(RuntimeError):
    """The recorded probabilities are not those of the attention kernel."""


@dataclass(frozen=True)
class Shares:
    """By layer, group of query rows and source, float64; the sources of a row sum to 1.

    found: (L, P, S) attention, the mean over heads and query rows.
    uniform: (P, S) what attention spread evenly over the visible keys would be.
    """

    found: Tensor
    uniform: Tensor


@dataclass
class _Record:
    """What is recorded, shared by the copies of a plan on several devices."""

    groups: Sequence[Tensor]
    sources: Tensor
    count: int
    last: Tensor  # (T,) last visible key of each token
    check: bool
    layers: list[Tensor] = field(default_factory=list)

    def add(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """One layer: q and out (T, H, E), k and v (T, K, E)."""
        keys, values = (x.float().transpose(0, 1) for x in (k, v))  # (K, T, E)
        shares = torch.zeros(len(self.groups), self.count, dtype=torch.float64)
        size = max(1, MAX_SCORES // (q.shape[1] * len(q)))
        for group, rows in enumerate(self.groups):
            for part in rows.split(size):
                seen = int(self.last[part].max()) + 1
                here = part.to(q.device)
                scores = masked_scores(q[here], keys[:, :seen], self.last[part].to(q.device))
                probabilities = scores.softmax(-1)
                if self.check:
                    largest = float(scores[scores.isfinite()].abs().max())
                    self._compare(probabilities, values[:, :seen], out[here], largest)
                looked = probabilities.mean(0).sum(0, dtype=torch.float64).cpu()
                shares[group].index_add_(0, self.sources[:seen], looked)
            shares[group] /= len(rows)
        self.layers.append(shares)

    def _compare(self, probabilities: Tensor, values: Tensor, out: Tensor, largest: float) -> None:
        """Probabilities (H, R, S) times values (K, S, E) against the kernel's (R, H, E).

        Both sides round: the kernel its probabilities and its output to its own dtype, and a score
        in float32, in proportion to its size, which the softmax turns into a relative error.
        """
        by_head = probabilities.view(len(values), -1, values.shape[1])  # (K, G R, S)
        kernel = out.float().transpose(0, 1)
        again = (by_head @ values).view_as(kernel)
        error = float((again - kernel).square().mean().sqrt() / kernel.square().mean().sqrt())
        single = torch.finfo(torch.float32).eps
        bound = 4 * torch.finfo(out.dtype).eps + 16 * single * (1 + largest)
        if not error <= bound:
            raise AttentionMismatchError(
                f"layer {len(self.layers)}: recorded attention times v differs from the kernel's "
                f"output by {error:.2g} of its size (rounding explains {bound:.2g}): the record "
                "does not show what the model does; report it with the attention backend and dtype"
            )


class RecordingPlan(Plan):
    """A plan whose attention is recorded on the way; the output is the plan's own."""

    def __init__(self, plan: Plan, record: _Record, device: torch.device | str) -> None:
        super().__init__(device)
        self.plan, self.record = plan, record

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.plan(q, k, v)
        self.record.add(q, k, v, out)
        return out

    def _rebuilt(self, device: torch.device) -> "RecordingPlan":
        return RecordingPlan(self.plan.to(device), self.record, device)


def masked_scores(q: Tensor, keys: Tensor, last: Tensor) -> Tensor:
    """(H, R, S) float32 scores of query rows q (R, H, E) and keys (K, S, E).

    last: (R,) the last key that a row sees; those behind it are at -inf.
    """
    rows, heads, width = q.shape
    by_head = q.float().transpose(0, 1).reshape(len(keys), -1, width)  # (K, G R, E)
    scores = (by_head @ keys.transpose(1, 2)).view(heads, rows, -1) * width**-0.5
    hidden = torch.arange(keys.shape[1], device=q.device) > last[:, None]
    return scores.masked_fill(hidden, -torch.inf)


def last_visible(splits: Sequence[Split]) -> Tensor:
    """(T,) the last key that each token of a sample sees: itself, or the end of its picture.

    Raises:
        ValueError: a noise split, which is not seen from outside.
    """
    ends, start = [], 0
    for split in splits:
        if split.mode == "noise":
            raise ValueError(
                "attention is recorded without noise splits: leave learned latents out"
            )
        end = start + split.length
        causal = split.mode == "causal"
        ends.append(torch.arange(start, end) if causal else torch.full((split.length,), end - 1))
        start = end
    return torch.cat(ends)


@torch.no_grad()
def attention_shares(
    model: Bagel,
    batch: PackedBatch,
    groups: Sequence[Tensor],
    sources: Tensor,
    count: int,
    check: bool = False,
) -> Shares:
    """Where groups of rows of one packed sample look, layer by layer, in one forward.

    Args:
        batch: one sample.
        groups: per group its query rows, int64 places in the packed sequence, at least one.
        sources: (T,) int64, the source of every token, 0 .. count - 1.
        check: compare with the attention kernel, layer by layer.

    Raises:
        AttentionMismatchError: `check`, and they differ by more than rounding.
        ValueError: several samples, noise splits, an empty group, or not one source per token.
    """
    if len(batch.samples) != 1 or len(sources) != len(batch) or not all(map(len, groups)):
        raise ValueError(
            f"{len(batch.samples)} samples, {len(sources)} sources for {len(batch)} tokens, groups "
            f"of {[len(rows) for rows in groups]} rows: give one sample, a source for each token "
            "and no empty group"
        )
    last = last_visible(batch.samples[0])
    record = _Record(groups, sources, count, last, check)
    batch = batch.to(model.device)
    inner = packed_plan(batch.samples, model.device, model.attention_backend)
    route = None
    if batch.latent_grids:
        und_index = torch.cat([batch.token_index, batch.patch_index])
        route = Route(und_index, batch.latent_index)
    plan = RecordingPlan(inner, record, model.device)
    model.language_model.model(model.embed(batch), batch.position_ids, plan, route)
    return Shares(torch.stack(record.layers), uniform_shares(last, groups, sources, count))


def uniform_shares(last: Tensor, groups: Sequence[Tensor], sources: Tensor, count: int) -> Tensor:
    """(P, S) float64 shares of attention that is the same for every visible key."""
    present = torch.nn.functional.one_hot(sources, count).double().cumsum(0)  # (T, S)
    visible = present[last] / (last + 1)[:, None]
    return torch.stack([visible[rows].mean(0) for rows in groups])
