"""Building blocks shared by the decoder, the image encoder and the generation head.

Legend: T packed tokens, D hidden, H heads, K kv-heads, E head_dim, N patches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to the input dtype, then scaled by a learned weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Connector(nn.Module):
    """Image features -> decoder width: fc1, tanh-GELU, fc2."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, out_size)
        self.fc2 = nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Flow time t in [0, 1] (not scaled) -> (N, D): sinusoid of 256, Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        sinusoid = timestep_frequencies(t, self.frequency_size)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


def timestep_frequencies(t: Tensor, size: int = 256) -> Tensor:
    """(N,) times -> (N, size) float32: cosine half first, then sine half, periods up to 10000."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PositionTable(nn.Module):
    """Fixed 2-D sin-cos table, (side * side, D), indexed by patch id. A constant, never trained."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side = side
        self.hidden_size = hidden_size
        self.register_buffer("pos_embed", torch.empty(side * side, hidden_size))
        self.reset()

    def reset(self) -> None:
        """Fill the table. Needed again after the module was built on the meta device."""
        if self.pos_embed.is_meta:
            return
        self.pos_embed.copy_(sincos_table_2d(self.side, self.hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return self.pos_embed[ids]


def sincos_table_2d(side: int, hidden_size: int) -> Tensor:
    """(side * side, D) float32, row id = row * side + column.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin, cos] over omega_i = 10000^(-i / (D/4)), computed in float64.
    """
    if hidden_size % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, got {hidden_size}")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D/2)
    columns = line[None, :, :].expand(side, -1, -1)
    rows = line[:, None, :].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, hidden_size).float()


def rope_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary tables for (T,) positions: two (T, E) float32 tensors with duplicated frequencies.

    Frequencies are recomputed on each call: a cached buffer would be rounded by dtype casts.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inv_freq = 1.0 / (theta ** (exponent / head_dim))
    angles = position_ids.float()[:, None] * inv_freq  # (T, E/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, H, E) by half-split pairs; cos, sin are (T, E) in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return x * cos[:, None, :] + rotated * sin[:, None, :]


def patch_position_ids(height: int, width: int, side: int, interpolate: bool = False) -> Tensor:
    """Ids of a (height, width) grid of patches in a table of `side` x `side`, raster order.

    extrapolate: row * side + column. interpolate: fractional coordinates are bucketed over the
    whole table, so that every picture spans it.

    Raises:
        ValueError: extrapolation of a grid that is larger than the table.
    """
    if interpolate:
        edges = torch.arange(1 / side, 1.0, 1 / side)
        fraction_h = torch.arange(0, 1 - 1e-6, 1 / height)
        fraction_w = torch.arange(0, 1 - 1e-6, 1 / width)
        rows = torch.bucketize(fraction_h, edges, right=True)
        columns = torch.bucketize(fraction_w, edges, right=True)
    else:
        if max(height, width) > side:
            raise ValueError(
                f"{height}x{width} patches do not fit the {side}x{side} position table: "
                "lower max_image_size"
            )
        rows, columns = torch.arange(height), torch.arange(width)
    return (rows[:, None] * side + columns).flatten()


def patchify(grid: Tensor, patch: int) -> Tensor:
    """(C, H, W) -> (H/p * W/p, p * p * C): raster patch order, inner order row, column, channel."""
    channels, height, width = grid.shape
    if height % patch or width % patch:
        raise ValueError(f"a grid of {height}x{width} does not divide into {patch}x{patch} patches")
    cells = grid.reshape(channels, height // patch, patch, width // patch, patch)
    return cells.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """What `patchify` took apart: (B, height * width, p * p * C) -> (B, C, height p, width p)."""
    cells = tokens.reshape(len(tokens), height, width, patch, patch, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height * patch, width * patch)
