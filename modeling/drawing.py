"""Pictures to latent tokens and back, and the drawing of latents by the model.

A drawing starts from noise and follows the velocities that the model gives its latent tokens, the
context being in a cache (see `modeling.flow` for the steps and for guidance). The contexts that
guidance compares are rows of one cache: each step is one forward over all of them.

Legend: B pictures, Z latent channels, h and w latent sides, p latent patch size, N latent tokens of
a picture, C = p p Z.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel, NoGenerationError
from modeling.flow import Guidance, euler, noised, timesteps
from modeling.kv_cache import KVCache
from modeling.layers import patchify, unpatchify
from modeling.sequence import Latent, PackedBatch, pack
from modeling.tokenizer import SpecialTokens

Step = Callable[[], None]
MAX_PIXELS = 1024 * 1024  # that the VAE takes at a time


@dataclass(frozen=True)
class DrawingParams:
    """num_timesteps: grid points from noise to picture, which bound one Euler step less.
    timestep_shift: see `modeling.flow.shifted`.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps={self.num_timesteps} bounds no step: give at least 2")
        if not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be above 0")


@torch.no_grad()
def encode(autoencoder: AutoEncoder, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents (B, Z, h, w) in float32 of pixels (B, 3, H, W); see `AutoEncoder.encode`."""
    weight = autoencoder.encoder.conv_in.weight
    parts = []
    for some in _bounded(pixels, *pixels.shape[-2:]):
        own = None if noise is None else noise[some].to(weight.device, weight.dtype)
        parts.append(autoencoder.encode(pixels[some].to(weight.device, weight.dtype), own).float())
    return torch.cat(parts)


@torch.no_grad()
def decode(autoencoder: AutoEncoder, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) float32, cut to [-1, 1], of latents (B, Z, h, w)."""
    weight = autoencoder.decoder.conv_in.weight
    factor = autoencoder.config.downsample
    parts = [
        autoencoder.decode(latents[some].to(weight.device, weight.dtype)).float().clamp(-1, 1)
        for some in _bounded(latents, *(side * factor for side in latents.shape[-2:]))
    ]
    return torch.cat(parts)


def _bounded(batch: Tensor, height: int, width: int) -> list[slice]:
    """Parts of a batch of pictures that the VAE takes at a time: its memory grows with pixels."""
    size = max(1, MAX_PIXELS // (height * width))
    return [slice(start, start + size) for start in range(0, len(batch), size)]


def latent_segment(
    latents: Tensor, patch: int, time: float | None = None, noise: Tensor | None = None
) -> Latent:
    """A picture (Z, h, w) as a block; with `time` and `noise` (Z, h, w), noised and learned."""
    height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
    if time is None:
        return Latent(patchify(latents, patch), height, width)
    x, target = noised(latents, noise, torch.tensor(time))
    return Latent(patchify(x, patch), height, width, time, patchify(target, patch))


@torch.no_grad()
def draw(
    model: Bagel,
    context: KVCache,
    without_text: KVCache,
    without_images: KVCache,
    noise: Tensor,
    params: DrawingParams,
    tokens: SpecialTokens,
    step: Step = lambda: None,
) -> Tensor:
    """Draw one picture per cache row; the caches stay as they are.

    Args:
        context, without_text, without_images: B rows each, the contexts of guidance. The last two
            are not looked at where guidance does without them.
        noise: (B, Z, h, w) standard normal.
        step: called after each of the `num_timesteps` - 1 steps.

    Returns:
        (B, Z, h, w) latents, float32.

    Raises:
        NoGenerationError: the model was opened without the generation expert and latent heads.
        ValueError: a picture beyond `max_latent_size`.
    """
    if not model.can_draw:
        raise NoGenerationError(
            "this model cannot draw: the generation expert and the latent heads were not loaded. "
            "Open the checkpoint with experts='all'; if that finds no latent heads, it has none"
        )
    patch = model.config.latent_patch_size
    B, _, height, width = noise.shape
    height, width = height // patch, width // patch
    x = torch.stack([patchify(picture, patch) for picture in noise]).to(context.device)
    times = timesteps(params.num_timesteps, params.timestep_shift)
    branches = params.guidance.contexts()
    caches = [context, without_text, without_images][:branches]
    capacity = max(cache.extent for cache in caches) + height * width + 2
    cache = KVCache.joined([(part, range(B)) for part in caches], capacity)
    blocks = [[Latent(tokens_of_row, height, width)] for tokens_of_row in x] * branches
    query = pack(blocks, tokens)
    queries: dict[int, tuple[KVCache, PackedBatch]] = {}

    def prepared(rows: int) -> tuple[KVCache, PackedBatch]:
        """Cache and query for as many rows; position and place of a token do not change."""
        if rows not in queries:
            part = cache.branch(rows)
            batch = query if rows == len(blocks) else pack(blocks[:rows], tokens)
            queries[rows] = part, batch.to(x.device).after(part.positions)
        return queries[rows]

    def velocity(x: Tensor, t: float) -> Tensor:
        text, images = params.guidance.branches(t)
        count = 1 + text + images
        part, batch = prepared(count * B)
        latents = x.repeat(count, 1, 1).flatten(0, 1)
        now = torch.full((len(latents),), t, device=x.device)
        v = model.velocity(dataclasses.replace(batch, latents=latents, times=now), part)
        v = v.float().reshape(count, B, *x.shape[1:])
        step()
        return params.guidance(v[0], v[1] if text else None, v[2] if images else None)

    return unpatchify(euler(x, times, velocity), height, width, patch)


def noise_like(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
