"""FLUX VAE: pictures to latents of an eighth of the side, and back.

A ladder of residual blocks, one rung per entry of `ch_mult`, with a strided convolution between the
rungs on the way down and a nearest-neighbour one on the way up; between the two halves a block
with attention over all positions. Attribute names are the keys of the released `ae.safetensors`.

Legend: B pictures, Z latent channels, H and W picture sides, h and w latent sides, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import VAEConfig

GROUPS, EPS = 32, 1e-6


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside the identity, or beside a 1x1 one where C changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = _conv(inputs, outputs)
        self.norm2 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """One head over all positions, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            proj(y).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h w, C)
            for proj in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(y.unflatten(2, x.shape[-2:]))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Rung(nn.Module):
    """The residual blocks of one resolution, then the way to the next one, if there is one."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(size, outputs) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for way in ("downsample", "upsample"):
            if hasattr(self, way):
                x = getattr(self, way)(x)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) to mean and log-variance (B, 2 Z, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        self.conv_in = _conv(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        for inputs, width in zip([config.ch, *widths[:-1]], widths, strict=True):
            self.down.append(Rung(inputs, width, config.num_res_blocks))
        for rung, width in zip(self.down[:-1], widths[:-1], strict=True):
            rung.downsample = Downsample(width)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for rung in self.down:
            x = rung(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) to pictures (B, 3, H, W). `up[0]` has the full resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        self.conv_in = _conv(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for inputs, width in zip([*widths[1:], widths[-1]], widths, strict=True):
            self.up.append(Rung(inputs, width, config.num_res_blocks + 1))
        for rung, width in zip(self.up[1:], widths[1:], strict=True):
            rung.upsample = Upsample(width)
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for rung in reversed(self.up):
            x = rung(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Pictures in [-1, 1] to latents of about unit scale, and back."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, Z, h, w) of pixels (B, 3, H, W) in [-1, 1].

        noise: (B, Z, h, w) standard normal, for a sample of the posterior; None gives its mean.

        Raises:
            ValueError: H or W is not a multiple of `downsample`.
        """
        factor = self.config.downsample
        height, width = pixels.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"a picture of {height} x {width} pixels cannot be encoded: its sides must be "
                f"multiples of {factor}; resize it first"
            )
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of latents (B, Z, h, w)."""
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)
