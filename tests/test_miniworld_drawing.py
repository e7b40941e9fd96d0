"""What the miniature draws with: its VAE, and the base that has not learned to draw yet."""

import json
import sys

import pytest
import torch

from data.miniworld import autoencoder, model
from data.miniworld.record import GRID
from data.processor import Processor
from data.prompts import MINI
from inferencer import InterleaveInferencer
from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.drawing import DrawingParams, draw, latent_segment, noise_like
from modeling.pretrained import is_generation_key, load_autoencoder
from modeling.sequence import pack
from modeling.tokenizer import load_tokenizer
from tests.tiny_model import TOKENS
from tests.training import weights_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Batches that take a core no time."""
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "CALIBRATION", 16)


@pytest.fixture(scope="module")
def pixels():
    return next(autoencoder.pictures(seed=5, size=12))


@torch.no_grad()
def error(vae, pixels):
    return float((vae.decode(vae.encode(pixels)) - pixels).square().mean())


# ---- the VAE ------------------------------------------------------------------------------------


def test_pictures_are_those_of_a_seed_in_cells_of_latent_tokens(pixels):
    assert pixels.shape == (12, 3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(next(autoencoder.pictures(5, 12)), pixels)
    assert not torch.equal(next(autoencoder.pictures(6, 12)), pixels)
    config, cell = autoencoder.CONFIG, autoencoder.TRANSFORM.image_stride
    patch = model.mini_config(8).latent_patch_size
    assert cell == patch * config.downsample == 64 // GRID
    assert model.mini_config(8).latent_channels == config.z_channels


def test_training_lowers_the_error_and_depends_on_the_seed_alone(pixels):
    first, again, later = (autoencoder.train(3, steps, progress=False) for steps in (1, 1, 10))
    for key, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key
    assert error(later, pixels) < 0.6 * error(first, pixels)


def test_calibrated_latents_have_zero_mean_and_unit_scale(pixels):
    """Of pictures that did not set the scale; what is decoded stays the same."""
    plain = AutoEncoder(autoencoder.CONFIG)
    with torch.no_grad():
        plain.encoder.conv_out.bias += 3.0
    calibrated = autoencoder.calibrated(plain, seed=1)
    with torch.no_grad():
        before, after = plain.encode(pixels), calibrated.encode(pixels)
    assert float(before.mean()) > 2 and not 0.8 < float(before.std()) < 1.25
    assert float(after.mean()) == pytest.approx(0, abs=0.05)
    assert float(after.std()) == pytest.approx(1, abs=0.05)
    assert error(calibrated, pixels) == pytest.approx(error(plain, pixels), rel=1e-4)


def test_the_command_writes_a_vae_that_opens(tmp_path, monkeypatch, capsys):
    argv = ["autoencoder", "--output", str(tmp_path / "new"), "--seed", "3", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    autoencoder.main()
    assert capsys.readouterr().out == f"miniature VAE: {tmp_path / 'new'}\n"
    opened, trained = load_autoencoder(tmp_path / "new"), autoencoder.train(3, 1, progress=False)
    assert opened.config == trained.config != autoencoder.CONFIG
    for key, value in trained.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value.bfloat16().float()), key
    assert (tmp_path / "new" / "ae.safetensors").stat().st_mode & 0o777 == 0o644
    assert json.loads((tmp_path / "new" / "vae_config.json").read_text())["z_channels"] == 4


# ---- the base -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained base, and what is made of it to learn drawing, with a VAE."""
    folder = tmp_path_factory.mktemp("miniature")
    model.write_untrained(folder / "base", seed=0)
    model.write_undrawn(folder / "base", folder / "undrawn", seed=1)
    autoencoder.save(AutoEncoder(autoencoder.CONFIG), folder / "undrawn")
    return folder


def test_the_understanding_path_stays_bit_for_bit(folders):
    base, undrawn = weights_of(folders / "base"), weights_of(folders / "undrawn")
    assert base.keys() == undrawn.keys()
    kept = [key for key in base if not is_generation_key(key)]
    assert len(kept) > 50
    assert all(torch.equal(base[key], undrawn[key]) for key in kept)
    assert not torch.equal(base["vae2llm.weight"], undrawn["vae2llm.weight"])  # of another seed


def test_the_generation_expert_is_a_copy_but_for_where_its_first_layer_looks(folders):
    state = weights_of(folders / "undrawn")
    looks = [f"layers.0.self_attn.{name}_" for name in ("q_proj", "k_proj", "q_norm", "k_norm")]
    copied = set()
    for key in filter(lambda key: "_moe_gen" in key, state):
        if not any(part in key for part in looks):
            assert torch.equal(state[key], state[key.replace("_moe_gen", "")]), key
            copied.add(key)
    assert len(copied) > 40


def test_the_first_layer_looks_at_the_same_cell_whatever_lies_there():
    """In float32: exports are rounded."""
    config = model.mini_config(64)
    drawer = Bagel(config, visual_gen=True).requires_grad_(False)
    for parameter in drawer.parameters():
        parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    for name, parameter in drawer.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.fill_(1.0)
    model.initialise_latents(drawer, seed=0)
    model.initialise_generation_expert(drawer, seed=0)
    layer, queries, keys = drawer.language_model.model.layers[0], [], []
    for seed, time in ((1, 0.0), (2, 0.9)):
        grid = noise_like((config.latent_channels, 2 * GRID, 2 * GRID), seed)
        batch = pack([[latent_segment(grid, 2, time, grid)]], TOKENS)
        x = layer.input_layernorm_moe_gen(drawer.encode_latents(batch))
        q, k, _ = layer.self_attn.qkv(x, "_moe_gen")
        queries.append(q)
        keys.append(k)
    scale = queries[0].abs().max()
    assert (queries[0] - queries[1]).abs().max() < 1e-3 * scale
    scores = torch.einsum("qhe,khe->hqk", queries[0].view(16, 2, 2, -1)[:, :, 0], keys[1])
    assert torch.equal(scores.argmax(-1), torch.arange(16).expand(2, 16))


def test_the_base_opens_and_its_velocities_are_zero(folders):
    inferencer = InterleaveInferencer.from_pretrained(folders / "undrawn", draws=True)
    drawer, special = inferencer.model, inferencer.processor.tokenizer.special
    context = inferencer.update_context_text("draw", inferencer.init_gen_context()).cache
    noise = noise_like((1, autoencoder.CONFIG.z_channels, 8, 8), 1)
    drawn = draw(drawer, *[context] * 3, noise, DrawingParams(3), special)
    torch.testing.assert_close(drawn, noise)
    drawer.llm2vae.bias.data.fill_(1.0)
    drawn = draw(drawer, *[context] * 3, noise, DrawingParams(3), special)
    torch.testing.assert_close(drawn, noise - 1)  # from time 1 to 0


def test_limits_and_prompts_of_the_base_stay(folders):
    for name in ("base", "undrawn"):
        processor = Processor.from_pretrained(folders / name)
        assert processor.transform == model.TRANSFORM
        assert processor.vae_transform == autoencoder.TRANSFORM
        assert processor.prompts == MINI
    words = [load_tokenizer(folders / name).encode("which piece") for name in ("base", "undrawn")]
    assert words[0] == words[1]
