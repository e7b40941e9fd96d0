"""Image preprocessing against values of the public implementation, and against its definition."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from data.transforms import ImageTransform, to_rgb
from modeling.layers import patchify
from tests.data_helpers import image

DATA = Path(__file__).parent / "data"
SIZES = json.loads((DATA / "resize_sizes.json").read_text())
SMALL = ImageTransform(112, 28, 14)
SMALL_VAE = ImageTransform(64, 16, 4)


@pytest.fixture(scope="module")
def images():
    with np.load(DATA / "transform_images.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", SIZES["cases"], ids=lambda c: f"{c['transform']}-{c['size']}")
def test_sizes_match_the_public_implementation(case):
    transform = ImageTransform(**SIZES["transforms"][case["transform"]])
    assert transform.size(*case["size"], img_num=case["img_num"]) == tuple(case["expected"])


def test_resized_pixels_are_exact(images):
    small = SMALL.resize(PIL.Image.fromarray(images["rgb40x30_in"]))
    np.testing.assert_array_equal(np.array(small), images["rgb40x30_small_u8"])
    for name in ("rgba48x36", "gray50x20"):
        resized = SMALL_VAE.resize(to_rgb(PIL.Image.fromarray(images[f"{name}_in"])))
        np.testing.assert_array_equal(np.array(resized), images[f"{name}_small_vae_u8"])


def test_alpha_is_laid_on_white(images):
    rgb = to_rgb(PIL.Image.fromarray(images["rgba48x36_in"]))
    np.testing.assert_array_equal(np.array(rgb), images["rgba48x36_rgb"])


def test_palette_and_grey_transparency_are_laid_on_white():
    palette = PIL.Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(PIL.Image.new("LA", (4, 4), (40, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(PIL.Image.new("L", (4, 4), 40)).getpixel((0, 0)) == (40, 40, 40)


def test_normalisation(images):
    pixels = torch.from_numpy(images["rgb40x30_small_u8"]).permute(2, 0, 1)
    expected = (pixels.double() / 255 - 0.5) / 0.5
    tensor = SMALL(PIL.Image.fromarray(images["rgb40x30_in"]))
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)


def test_patchify_order_is_row_column_channel():
    pixels = torch.arange(3 * 28 * 42, dtype=torch.float32).reshape(3, 28, 42)
    patches = patchify(pixels, 14)
    assert patches.shape == (6, 588)
    rng = np.random.default_rng(0)
    for _ in range(50):
        i, j, p, q, c = (int(rng.integers(n)) for n in (2, 3, 14, 14, 3))
        assert patches[i * 3 + j, (p * 14 + q) * 3 + c] == pixels[c, i * 14 + p, j * 14 + q]
    with pytest.raises(ValueError, match="28x42 does not divide"):
        patchify(pixels, 5)


def test_scale_shrinks_to_whole_patches():
    transform = ImageTransform()
    assert transform.size(980, 980) == (980, 980)
    assert transform.size(980, 980, scale=0.5) == (490, 490)
    assert transform.size(980, 980, scale=0.99) == (966, 966)
    assert transform.size(980, 500, scale=1e-3) == (14, 14)
    with pytest.raises(ValueError, match="scale=1.5"):
        transform.size(980, 980, scale=1.5)


def test_segment_has_the_grid_of_the_resized_image():
    segment = SMALL.segment(image(5, (100, 30)))
    assert (segment.height, segment.width) == (2, 7)
    assert segment.patches.shape == (14, 588)


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="image_stride <= min_image_size"):
        ImageTransform(max_image_size=224, min_image_size=378)
