"""The order of a mixture: which source serves a draw, and which of its rows.

Everything is a function of (seed, index); what is cached is bounded and can be recomputed.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.example import DataError
from data.parquet import CACHE_BYTES, ParquetSource, permutation
from data.streams import stream_seed

MAX_BLOCK = 65_536  # draws that are shuffled together, bounds the memory of the order
WEIGHTED_BLOCK = 10_000  # weights are exact to one draw in this many
WINDOW_GROUPS = 8  # row groups whose rows are shuffled together, if they fit into the cache


class Schedule:
    """Which source serves a draw, and how many draws it served before.

    Draws come in shuffled blocks with a fixed number of draws per source. By default a block is one
    epoch of all sources together.
    """

    def __init__(
        self, sources: Sequence[ParquetSource], weights: Sequence[float] | None, seed: int
    ) -> None:
        rows = [len(source) for source in sources]
        self.block = WEIGHTED_BLOCK if weights else min(sum(rows), MAX_BLOCK)
        self.counts = _apportion(np.array(weights or rows, dtype=np.float64), self.block)
        if min(self.counts) == 0:
            name = sources[int(np.argmin(self.counts))].name
            raise DataError(
                f"{name} would get less than one draw in {self.block}: raise its weight"
            )
        self.seed = seed
        self._labels = np.repeat(np.arange(len(rows)), self.counts)
        self._blocks = _Recent(2)

    def place(self, index: int) -> tuple[int, int]:
        """(source, number of its earlier draws) of a draw."""
        block, offset = divmod(index, self.block)
        labels, ranks = self._blocks.get(block, lambda: self._shuffled(block))
        which = int(labels[offset])
        return which, block * self.counts[which] + int(ranks[offset])

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        seed = stream_seed(self.seed, "data", "block", block)
        labels = self._labels[permutation(seed, self.block)]
        ranks = np.empty_like(labels)
        for which, count in enumerate(self.counts):
            ranks[labels == which] = np.arange(count)
        return labels, ranks


class EpochOrder:
    """Order of the rows of one source: row groups are permuted, rows inside windows of them.

    Neighbours in the order share few row groups, so that reading stays local.
    """

    def __init__(self, source: ParquetSource, seed: int) -> None:
        self.key = (seed, "data", "epoch", source.name)
        self.sizes = source.group_sizes
        self.firsts = np.cumsum(self.sizes) - self.sizes  # first row of each group
        fitting = int(CACHE_BYTES // (2 * max(source.mean_group_bytes, 1.0)))
        self.window = max(1, min(WINDOW_GROUPS, fitting))
        self.total = int(self.sizes.sum())
        self._epochs, self._windows = _Recent(2), _Recent(2)

    def row(self, position: int) -> tuple[int, int]:
        """(epoch, row) of the draw `position` of this source."""
        epoch, offset = divmod(position, self.total)
        groups, starts = self._epochs.get(epoch, lambda: self._windows_of(epoch))
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        rows = self._windows.get((epoch, window), lambda: self._rows_of(epoch, window, groups))
        return epoch, int(rows[offset - int(starts[window])])

    def _windows_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        groups = permutation(stream_seed(*self.key, epoch), len(self.sizes))
        lengths = np.add.reduceat(self.sizes[groups], np.arange(0, len(groups), self.window))
        return groups, np.cumsum(lengths) - lengths

    def _rows_of(self, epoch: int, window: int, groups: np.ndarray) -> np.ndarray:
        members = groups[window * self.window : (window + 1) * self.window]
        rows = np.concatenate(
            [np.arange(self.firsts[g], self.firsts[g] + self.sizes[g]) for g in members]
        )
        return rows[permutation(stream_seed(*self.key, epoch, window), len(rows))]


class _Recent:
    """The last few values computed, by key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = compute()
            if len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def _apportion(weights: np.ndarray, total: int) -> list[int]:
    """Whole counts that sum to `total`, in proportion to `weights` (largest remainders)."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts.tolist()
