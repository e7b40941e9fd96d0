"""Means over categories, bootstrap and Wilson intervals, and gap closing (Eq. 9)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.streams import stream_seed

RESAMPLES = 2000
Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
PERCENTILES = (2.5, 97.5)
OVERALL = "overall"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StratifiedMeans:
    """Means of several measures per category and overall, with their bootstrap resamples.

    All measures of a resample are means over the same drawn samples, so differences and ratios
    of them have paired intervals. "overall" is the mean of the category means.
    """

    measures: tuple[str, ...]
    point: Mapping[str, np.ndarray]  # category or "overall" -> (M,)
    resampled: Mapping[str, np.ndarray]  # the same -> (RESAMPLES, M)

    @classmethod
    def of(
        cls, values: Mapping[str, Mapping[str, list[float]]], seed: int, resamples: int = RESAMPLES
    ) -> "StratifiedMeans":
        """values[category][measure] = one number per sample, in the same order for all measures."""
        measures = tuple(next(iter(values.values())))
        point, resampled = {}, {}
        for category, columns in values.items():
            table = np.array([columns[name] for name in measures], dtype=np.float64).T  # (n, M)
            n = len(table)
            generator = np.random.default_rng(stream_seed(seed, "bootstrap", category))
            counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)  # (RESAMPLES, n)
            point[category] = table.mean(axis=0)
            resampled[category] = counts @ table / n
        for means in (point, resampled):
            means[OVERALL] = np.mean(list(means.values()), axis=0)
        return cls(measures, point, resampled)

    def mean(self, category: str, measure: str) -> Estimate:
        column = self.measures.index(measure)
        return _estimate(self.point[category][column], self.resampled[category][:, column])

    def gap_closed(self, category: str, pre: str, post: str) -> Estimate:
        """Eq. 9, 1 - post / pre; negative where the student moved away. Not clamped."""
        columns = [self.measures.index(name) for name in (pre, post)]
        k_pre, k_post = self.point[category][columns]
        if k_pre <= 0:
            raise ValueError(f"{category}: {pre} is {k_pre}, there is no gap that could be closed")
        draws = self.resampled[category][:, columns]
        return _estimate(gap_closed(k_pre, k_post), gap_closed(draws[:, 0], draws[:, 1]))


def gap_closed(k_pre, k_post):
    """Share of the pre-training gap that is gone, 1 - K_post / K_pre (Eq. 9)."""
    return 1 - k_post / k_pre


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share observed in n trials."""
    if n < 1:
        raise ValueError(f"n={n}: an interval needs at least one trial")
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws, PERCENTILES)
    return Estimate(float(value), float(low), float(high))
