"""Images -> pixels -> patches: NaViT size limits, normalisation to [-1, 1], patchify.

One resize serves the understanding encoder (980 / 378 / 14) and, with its own numbers, the VAE.
"""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from modeling.layers import patchify
from modeling.sequence import Image


@dataclass(frozen=True)
class ImageTransform:
    """Resize within limits, then scale to [-1, 1]. Defaults are the paper's (App. C, M).

    The long side is at most `max_image_size` and the short side at least `min_image_size` where
    both can hold; sides are multiples of `image_stride`. The rule has the quirks of the public
    implementation (released weights have seen no other): an image over `max_pixels` has both
    *sides* multiplied by the ratio of the *areas*, and the short side may end below its limit.
    """

    max_image_size: int = 980
    min_image_size: int = 378
    image_stride: int = 14
    max_pixels: int = 2_007_040

    def __post_init__(self) -> None:
        if not 0 < self.image_stride <= self.min_image_size <= self.max_image_size:
            raise ValueError(
                f"image sizes need 0 < image_stride <= min_image_size <= max_image_size, got {self}"
            )
        if self.max_pixels < self.image_stride**2:
            raise ValueError(f"max_pixels={self.max_pixels} is below one patch: raise it")

    def size(
        self, width: int, height: int, img_num: int = 1, scale: float = 1.0
    ) -> tuple[int, int]:
        """(width, height) in pixels after `resize`.

        Args:
            img_num: number of images that share `max_pixels`.
            scale: factor <= 1 on the final sides, rounded down to whole patches (at least one).
        """
        factor = min(self.max_image_size / max(width, height), 1.0)
        factor = max(factor, self.min_image_size / min(width, height))
        size = self._scaled(width, height, factor)
        area = size[0] * size[1]
        if area > self.max_pixels / img_num:
            size = self._scaled(*size, self.max_pixels / img_num / area)
        if max(size) > self.max_image_size:
            size = self._scaled(*size, self.max_image_size / max(size))
        if scale == 1.0:
            return size
        if not 0.0 < scale < 1.0:
            raise ValueError(f"scale={scale} must lie in (0, 1]: images are only ever shrunk")
        stride = self.image_stride
        shrunk = [max(stride, int(side * scale) // stride * stride) for side in size]
        return shrunk[0], shrunk[1]

    def _scaled(self, width: int, height: int, factor: float) -> tuple[int, int]:
        # Rounded to pixels first and to strides second, halves to even both times.
        stride = self.image_stride
        sides = [round(round(side * factor) / stride) * stride for side in (width, height)]
        return max(sides[0], stride), max(sides[1], stride)

    def resize(self, image: PIL.Image.Image, scale: float = 1.0) -> PIL.Image.Image:
        """Bicubic, antialiased resize to `size`; the image itself where the size is right."""
        size = self.size(*image.size, scale=scale)
        return image if size == image.size else image.resize(size, PIL.Image.Resampling.BICUBIC)

    def __call__(self, image: PIL.Image.Image, scale: float = 1.0) -> Tensor:
        """(3, H, W) float32 in [-1, 1]."""
        pixels = np.array(self.resize(to_rgb(image), scale))  # (H, W, 3) uint8
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
        return tensor.sub_(0.5).div_(0.5).contiguous()

    def segment(self, image: PIL.Image.Image, scale: float = 1.0) -> Image:
        """The image as a segment for the understanding encoder, one patch per stride."""
        return to_segment(self(image, scale), self.image_stride)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB copy (or the image itself if it is RGB); transparency is laid on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def to_segment(pixels: Tensor, patch: int) -> Image:
    """(3, H, W) normalised pixels as an image segment of patch x patch squares."""
    height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
    return Image(patches=patchify(pixels, patch), height=height, width=width)
