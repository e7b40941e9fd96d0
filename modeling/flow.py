"""Rectified flow: how latents are noised for training, and how noise becomes latents.

    x_t = (1 - t) clean + t noise        t = 1 is noise, t = 0 the picture
    v   = noise - clean = d x_t / d t    what the velocity head learns, and what Euler steps follow

Legend: B pictures, N latent tokens of a picture, C channels of a latent token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Renorm = Literal["global", "channel", "text_channel"]
RENORM_EPS = 1e-8


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise: s t / (1 + (s - 1) t); 1 leaves them alone, 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(count: int, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float32 times from 1 to 0. They bound count - 1 Euler steps.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"num_timesteps={count} bounds no step: give at least 2")
    return shifted(torch.linspace(1, 0, count, device=device), shift)


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity to learn, of the shape of `clean`; t broadcasts, 0 leaves it clean."""
    return (1 - t) * clean + t * noise, noise - clean


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance from velocities under three contexts: all, without the last text,
    and without images.

    text_scale: 1 or less means no guidance at all, also by the image.
    image_scale: 1 or less leaves the image branch out.
    interval: guided where low < t <= high, t being shifted.
    renorm: what keeps the norm of the unguided velocity: "global" over tokens and channels,
        "channel" per token, "text_channel" per token before the image step and not after it.
    renorm_min: least factor of the renormalisation; the greatest is 1.
    """

    text_scale: float = 4.0
    image_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Renorm = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in ("global", "channel", "text_channel"):
            raise ValueError(
                f"renorm={self.renorm!r} is unknown: choose global, channel or text_channel"
            )

    def branches(self, t: float) -> tuple[bool, bool]:
        """Whether the velocities without text and without images are needed at time t."""
        low, high = self.interval
        text = self.text_scale > 1 and low < t <= high
        return text, text and self.image_scale > 1

    def contexts(self) -> int:
        """How many contexts are compared: all, without text, without images."""
        return 1 if self.text_scale <= 1 else 2 + (self.image_scale > 1)

    def __call__(
        self, full: Tensor, without_text: Tensor | None, without_images: Tensor | None
    ) -> Tensor:
        """The guided velocity (B, N, C). None stands for a branch that is not needed."""
        if without_text is None:
            return full
        guided = without_text + self.text_scale * (full - without_text)
        if self.renorm == "text_channel":
            guided = self._renormalised(guided, full, dims=(-1,))
        if without_images is not None:
            guided = without_images + self.image_scale * (guided - without_images)
        if self.renorm == "text_channel":
            return guided
        dims = (-2, -1) if self.renorm == "global" else (-1,)
        return self._renormalised(guided, full, dims)

    def _renormalised(self, guided: Tensor, full: Tensor, dims: tuple[int, ...]) -> Tensor:
        norms = (torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (full, guided))
        factor = next(norms) / (next(norms) + RENORM_EPS)
        return guided * factor.clamp(self.renorm_min, 1.0)


@torch.no_grad()
def euler(noise: Tensor, times: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Follow `velocity(x, t)` from `noise` at times[0] to times[-1]; times (T,) descend."""
    x = noise
    for t, step in zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True):
        x = x - velocity(x, t) * step
    return x
