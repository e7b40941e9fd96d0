"""Random streams: pinned values, no collisions between purposes and keys."""

import numpy as np
import pytest

from data.streams import stream_seed


def test_value_is_pinned_across_processes_and_versions():
    assert stream_seed(42, "rollout", 7, 3) == 4843890483828661378
    assert stream_seed(42, "data", "epoch", "Visual_Search", 0) == 3962736974577276092


def test_numpy_integers_are_integers_and_floats_are_refused():
    assert stream_seed(0, "noise", np.int64(5)) == stream_seed(0, "noise", 5)
    with pytest.raises(TypeError):
        stream_seed(0, "noise", 5.0)


def test_streams_are_distinct_and_63_bit():
    seeds = {
        stream_seed(seed, purpose, step, row)
        for seed in (0, 1)
        for purpose in ("rollout", "noise")
        for step in range(20)
        for row in range(20)
    }
    assert len(seeds) == 2 * 2 * 20 * 20
    assert all(0 <= value < 2**63 for value in seeds)
    assert stream_seed(1, "data", 23) != stream_seed(1, "data", 2, 3)
