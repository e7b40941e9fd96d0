"""Building blocks against closed forms in float64."""

import math

import pytest
import torch
from torch import nn

from modeling.layers import (
    Connector,
    PositionTable,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    apply_rope,
    patch_position_ids,
    rope_cos_sin,
    sincos_table_2d,
    timestep_frequencies,
)


def test_rms_norm_in_float64_and_dtype():
    norm = RMSNorm(16, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 16) * torch.tensor([1e-3, 1e-1, 1.0, 10.0, 100.0])[:, None]
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_rms_norm_rounds_before_the_weight():
    """In bfloat16 the normalised value is rounded first and scaled second."""
    norm = RMSNorm(8).to(torch.bfloat16)
    nn.init.constant_(norm.weight, 1.2578125)
    x = torch.randn(64, 8).bfloat16()
    wide = x.float()
    unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), unit * norm.weight)


def test_swiglu_and_connector():
    mlp, connector, x = SwiGLU(6, 10), Connector(6, 4), torch.randn(3, 6)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
    h = connector.fc1(x)
    tanh_gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(connector(x), connector.fc2(tanh_gelu))


def test_rope_rotates_each_pair_by_its_angle():
    positions, theta = torch.tensor([0, 3, 11]), 100.0
    x = torch.randn(3, 2, 8)
    rotated = apply_rope(x, *rope_cos_sin(positions, 8, theta))
    for t, position in enumerate(positions.tolist()):
        for pair in range(4):
            turn = complex(0, position * theta ** (-2 * pair / 8))
            z = torch.complex(x[t, :, pair], x[t, :, pair + 4]) * torch.tensor(turn).exp()
            torch.testing.assert_close(rotated[t, :, pair], z.real, atol=1e-5, rtol=0)
            torch.testing.assert_close(rotated[t, :, pair + 4], z.imag, atol=1e-5, rtol=0)


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(i, j):
        a = apply_rope(q, *rope_cos_sin(torch.tensor([i]), 16, 1e4))
        b = apply_rope(k, *rope_cos_sin(torch.tensor([j]), 16, 1e4))
        return float((a * b).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_sincos_table_entries():
    """Columns in the first half, rows in the second; sines before cosines."""
    side, width = 5, 16
    table = sincos_table_2d(side, width)
    for row in range(side):
        for column in range(side):
            for half, coordinate in ((0, column), (8, row)):
                for i in range(4):
                    angle = coordinate * 10000.0 ** (-i / 4)
                    entry = table[row * side + column]
                    assert entry[half + i] == pytest.approx(math.sin(angle), abs=1e-7)
                    assert entry[half + 4 + i] == pytest.approx(math.cos(angle), abs=1e-7)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        sincos_table_2d(2, 6)


def test_position_table_is_no_parameter_and_survives_the_meta_device():
    with torch.device("meta"):
        table = PositionTable(3, 8)
    assert list(table.parameters()) == []
    table = table.to_empty(device="cpu")
    table.reset()
    assert torch.equal(table(torch.tensor([7])), sincos_table_2d(3, 8)[7:8])


def test_timestep_features():
    t = torch.tensor([0.0, 0.3, 1.0])
    features = timestep_frequencies(t, 8)
    for n, time in enumerate(t.tolist()):
        for i in range(4):
            angle = time * 10000 ** (-i / 4)
            assert features[n, i] == pytest.approx(math.cos(angle), abs=1e-6)
            assert features[n, 4 + i] == pytest.approx(math.sin(angle), abs=1e-6)
    embedder = TimestepEmbedder(12)
    h = embedder.mlp[0](timestep_frequencies(t))
    torch.testing.assert_close(embedder(t), embedder.mlp[2](h / (1 + (-h).exp())))


def test_patch_ids():
    assert patch_position_ids(2, 3, 70).tolist() == [0, 1, 2, 70, 71, 72]
    # bucketed: a 2x2 grid spans a table of side 4 in steps of two
    assert patch_position_ids(2, 2, 4, interpolate=True).tolist() == [0, 2, 8, 10]
    with pytest.raises(ValueError, match="5x2 patches .*not fit the 4x4 position table"):
        patch_position_ids(5, 2, 4)
