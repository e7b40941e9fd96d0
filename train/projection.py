"""Scores of hidden states through the vocabulary head, a chunk of rows at a time, with gradients.

`weighted_sum` computes the gradient of its sum together with the sum, chunk by chunk, as fused
linear cross-entropy does: the derivative with respect to the logits of a chunk comes from ordinary
autograd on the score, and is taken through the head before the next chunk is projected. Neither a
table of all rows by the vocabulary nor the graph of a chunk outlives its chunk, and the backward
pass only scales. `row_values` leaves the weights of the rows to its caller; the logits are then
computed again in the backward pass, where those weights are known.

Shapes: R rows, C rows of one chunk, V vocabulary, K entries of a row, N = C * K, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ROWS = 128  # rows projected at once; 128 x 152k logits are 39 MB in bfloat16
BLOCK = 1024  # rows or columns of a gradient's temporary; 7 MB to 67 MB in bfloat16 at 7B

# score(logits (C, V) without gradient, entries, span of the chunk's rows) -> per-row tensors (C,):
# the values to differentiate with respect to `entries`, then what is only watched.
Score = Callable[[Tensor, Tensor, slice], tuple[Tensor, ...]]


class Projection:
    """Hidden states to logits, without gradient, in one dtype; the weight is converted once.

    The next call overwrites the logits of this one: on a CPU, fresh memory of their size takes as
    long as the product at small D.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)  # (V, D)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.logits = self.weight.new_empty(0, len(weight))

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (C, V) of hidden states (C, D)."""
        rows = rows.to(self.weight.dtype)
        if len(self.logits) < len(rows):
            self.logits = self.weight.new_empty(len(rows), len(self.weight))
        logits = self.logits[: len(rows)]
        with torch.autocast(rows.device.type, enabled=False):  # the dtype is chosen already
            if self.bias is None:
                return torch.mm(rows, self.weight.T, out=logits)
            return torch.addmm(self.bias, rows, self.weight.T, out=logits)


def projection(hidden: Tensor, lm_head: nn.Linear) -> Projection:
    return Projection(lm_head.weight, lm_head.bias, product_dtype(hidden, lm_head.weight))


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The wider dtype of the two; under autocast its dtype.

    So training in bfloat16 has bfloat16 logits, sharded (narrow states and gathered weights) or not
    (autocast); every softmax over them is float32. They are 0.06 to 0.125 apart at the usual
    magnitudes: where that matters, hand over float32 hidden states without autocast.
    """
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves that alone
        return torch.get_autocast_dtype(device)
    return dtype


def chunks(rows: Tensor, chunk_rows: int) -> tuple[Tensor, ...]:
    """`rows` in parts of `chunk_rows`; one empty part when there are none."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1; {CHUNK_ROWS} is the default")
    return rows.split(chunk_rows)


def collect(parts: Iterable[tuple[Tensor, ...]], rows: int) -> list[Tensor]:
    """Columns (R, ...) from the parts (C, ...) of all chunks, each copied to its place at once.

    Kept for a concatenation, they would lie between the tables of one chunk and of the next, and a
    CPU's allocator could not use that memory again.
    """
    columns: list[Tensor] = []
    start = 0
    for part in parts:
        if not columns:
            columns = [x.new_empty(rows, *x.shape[1:]) for x in part]
        for column, x in zip(columns, part, strict=True):
            column[start : start + len(x)] = x
        start += len(part[0])
    return columns


def weighted_sum(
    hidden: Tensor,
    lm_head: nn.Linear,
    score: Score,
    row_weights: Tensor,
    chunk_rows: int = CHUNK_ROWS,
    ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Sum of row_weights (R,) * values (), differentiable; then values and watched, (R,) each.

    `ids` (R, K): the entries of each row's logits that `score` differentiates and gets as `entries`
    (C, K); by default all of them. Gradients reach `hidden` and `lm_head`; the graph can be walked
    backward once, and not be differentiated again.
    """
    sweep = _Sweep(score, product_dtype(hidden, lm_head.weight), chunk_rows, ids)
    if torch.is_grad_enabled():
        return _WeightedSum.apply(hidden, lm_head.weight, lm_head.bias, row_weights.detach(), sweep)
    columns, _ = sweep(hidden, lm_head.weight, lm_head.bias)
    return _weighted(columns[0], row_weights), *columns


def row_values(
    hidden: Tensor, lm_head: nn.Linear, score: Score, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Values (R,) of `score`, differentiable once with any weights.

    Where the weights are known beforehand, `weighted_sum` saves projecting twice.
    """
    sweep = _Sweep(score, product_dtype(hidden, lm_head.weight), chunk_rows)
    return _RowValues.apply(hidden, lm_head.weight, lm_head.bias, sweep)


class _WeightedSum(torch.autograd.Function):
    """The gradients are made in the forward pass; the backward pass scales them in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, row_weights, sweep):
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[:3]
        columns, ctx.gradients = sweep(hidden, weight, bias, row_weights, wanted)
        ctx.mark_non_differentiable(*columns)
        return _weighted(columns[0], row_weights), *columns

    @staticmethod
    def backward(ctx, scale, *_):
        _first_order_only()
        if scale is None:
            return (None,) * 5
        gradients, ctx.gradients = ctx.gradients, None  # a copy would double the weight's
        if gradients is None:
            raise RuntimeError(
                "the gradients of a chunked loss are handed out once: for a second backward pass, "
                "compute the loss again"
            )
        return *(None if x is None else x.mul_(scale) for x in gradients), None, None


class _RowValues(torch.autograd.Function):
    """The backward pass projects again, now with the gradient of every row's value."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, sweep):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.sweep = sweep
        columns, _ = sweep(hidden, weight, bias)
        return columns[0]

    @staticmethod
    def backward(ctx, row_weights):
        _first_order_only()
        _, gradients = ctx.sweep(*ctx.saved_tensors, row_weights, ctx.needs_input_grad[:3])
        return *gradients, None


def _first_order_only() -> None:
    # `once_differentiable` lets a gradient pass as a constant whose own upstream is one.
    if torch.is_grad_enabled():
        raise RuntimeError("a chunked loss has no second derivatives: leave out create_graph=True")


@dataclass(frozen=True)
class _Sweep:
    """One pass over all chunks: what they score, and the gradients that are wanted."""

    score: Score
    dtype: torch.dtype  # of the products
    chunk_rows: int
    ids: Tensor | None = None  # (R, K) see `weighted_sum`

    @torch.no_grad()
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weights: Tensor | None = None,
        wanted: tuple[bool, bool, bool] = (False, False, False),
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Columns (R,) of the score; gradients of hidden, weight and bias where `wanted`."""
        leaves = zip((hidden, weight, bias), wanted, strict=True)
        gradients = [torch.zeros_like(x) if asked else None for x, asked in leaves]
        project = Projection(weight, bias, self.dtype)

        def columns() -> Iterator[tuple[Tensor, ...]]:
            start = 0
            for part in chunks(hidden, self.chunk_rows):
                rows, span = part.to(self.dtype), slice(start, start + len(part))
                start = span.stop
                share = row_weights[span] if any(wanted) else None
                found, gradient = self._score(project(rows), span, share)
                if gradient is not None:
                    self._project_back(gradient, span, rows, project.weight, gradients)
                yield found

        with torch.autocast(hidden.device.type, enabled=False):  # dtypes are chosen here
            return collect(columns(), len(hidden)), gradients

    def _span(self, span: slice) -> Tensor | None:
        return None if self.ids is None else self.ids[span]

    def _score(
        self, logits: Tensor, span: slice, row_weights: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Columns (C,) of a chunk and the gradient with respect to its entries, if weighted."""
        ids = self._span(span)
        entries = logits if ids is None else logits.gather(-1, ids)
        if row_weights is None:
            return self.score(logits, entries, span), None
        with torch.enable_grad():
            entries = entries.detach().requires_grad_()
            values, *watched = self.score(logits, entries, span)
            (gradient,) = torch.autograd.grad(values, entries, row_weights.to(values.dtype))
        return (values.detach(), *watched), gradient

    def _project_back(
        self,
        gradient: Tensor,
        span: slice,
        rows: Tensor,
        weight: Tensor,
        gradients: list[Tensor | None],
    ) -> None:
        """Take a chunk's gradient on its entries through the head, into the `gradients`."""
        ids, vocab = self._span(span), len(weight)
        if ids is not None and ids.numel() > vocab:  # the host knows that; their union it does not
            gradient = gradient.new_zeros(len(ids), vocab).scatter_add_(1, ids, gradient)
            ids = None
        d_hidden, d_weight, d_bias = gradients
        if ids is None:
            if d_hidden is not None:
                d_hidden[span] = gradient @ weight
            if d_weight is not None:
                _add_product(d_weight, gradient, rows)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            return
        if d_hidden is not None:
            d_hidden[span] = _bag(ids, weight, gradient)
        if d_weight is not None:
            _add_entries(d_weight, ids, gradient, rows)
        if d_bias is not None:
            d_bias.index_add_(0, ids.flatten(), gradient.flatten().to(d_bias.dtype))


def _bag(ids: Tensor, table: Tensor, factors: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Sums of the rows `ids` of the table times their factors, over dim 1 or from offsets on."""
    return F.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=factors)


def _add_entries(total: Tensor, ids: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, D) += the product of the entries `left` (C, K) at `ids` and `right` (C, D).

    Entries of one id are summed before they are added. The sum stands at the first of them, zeros
    at the others: so the sizes are the same whatever the ids, and no GPU is waited for.
    """
    chosen, order = ids.flatten().sort(stable=True)  # (N,)
    places = torch.arange(len(chosen), device=ids.device)
    first = torch.ones_like(chosen, dtype=torch.bool)
    first[1:] = chosen[1:] != chosen[:-1]
    # Bag n goes from offsets[n] to offsets[n + 1]: where it is not the first, the next id's first.
    offsets = places.where(first, len(places)).flip(0).cummin(0).values.flip(0)
    source, factors = order // ids.shape[1], left.flatten()[order]
    for part, columns in zip(total.split(BLOCK, dim=1), right.split(BLOCK, dim=1), strict=True):
        sums = _bag(source, columns.contiguous(), factors, offsets)  # (N, columns)
        part.index_add_(0, chosen, sums.to(total.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, D) += left.T @ right for left (C, V), right (C, D)."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)  # rounded once, after the addition
        return
    for part, columns in zip(total.split(BLOCK), left.split(BLOCK, dim=1), strict=True):
        part += columns.T @ right  # autocast: float32 sums of bfloat16 products


def _weighted(values: Tensor, row_weights: Tensor) -> Tensor:
    return (row_weights.to(values.dtype) * values).sum()
