"""The FLUX VAE against `diffusers`, its key names at full size, and its folder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modeling.autoencoder import AutoEncoder
from modeling.config import ConfigError, VAEConfig
from modeling.pretrained import CheckpointError, load_autoencoder

TINY = VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=4)
TOLERANCE = 2e-5


@torch.no_grad()
def autoencoder(config: VAEConfig = TINY) -> AutoEncoder:
    """Torch's initial weights, and norms that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = AutoEncoder(config).requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    return model


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def diffusers_key(key: str, rungs: int) -> str:
    """The name that diffusers gives our weight; it counts the decoder's rungs from the bottom."""
    side, *rest = key.split(".")
    name = ".".join(rest)
    if rest[0] == "down":
        name = name.replace(f"down.{rest[1]}.block.", f"down_blocks.{rest[1]}.resnets.")
        name = name.replace(f"down.{rest[1]}.downsample.", f"down_blocks.{rest[1]}.downsamplers.0.")
    if rest[0] == "up":
        rung = rungs - 1 - int(rest[1])
        name = name.replace(f"up.{rest[1]}.block.", f"up_blocks.{rung}.resnets.")
        name = name.replace(f"up.{rest[1]}.upsample.", f"up_blocks.{rung}.upsamplers.0.")
    for ours, theirs in (
        ("mid.block_1", "mid_block.resnets.0"),
        ("mid.block_2", "mid_block.resnets.1"),
        ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
        ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
        ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
        ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
        ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
        ("norm_out", "conv_norm_out"),
        ("nin_shortcut", "conv_shortcut"),
    ):
        name = name.replace(ours, theirs)
    return f"{side}.{name}"


def test_it_computes_what_diffusers_does():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: Python 3.11 or newer")
    rungs, kinds = len(TINY.ch_mult), ("DownEncoderBlock2D", "UpDecoderBlock2D")
    other = diffusers.AutoencoderKL(
        down_block_types=kinds[:1] * rungs,
        up_block_types=kinds[1:] * rungs,
        block_out_channels=[TINY.ch * factor for factor in TINY.ch_mult],
        layers_per_block=TINY.num_res_blocks,
        latent_channels=TINY.z_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ours = autoencoder()
    theirs = other.state_dict()
    converted = {
        name: value.reshape(theirs[name].shape)  # its attention has matrices for 1x1 convolutions
        for key, value in ours.state_dict().items()
        for name in [diffusers_key(key, rungs)]
    }
    other.load_state_dict(converted, strict=True)
    x = pictures(2, 3, 24, 40)
    with torch.no_grad():
        posterior = other.encode(x).latent_dist
        plain = TINY.scale_factor * (posterior.mean - TINY.shift_factor)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
        drawn = posterior.mean + posterior.std * noise
        drawn = TINY.scale_factor * (drawn - TINY.shift_factor)
        shown = other.decode(posterior.mean).sample
    assert plain.abs().mean() > 1e-2 and shown.abs().mean() > 1e-2
    torch.testing.assert_close(ours.encode(x), plain, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(ours.encode(x, noise), drawn, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(ours.decode(plain), shown, atol=TOLERANCE, rtol=TOLERANCE)


def test_full_size_has_the_published_numbers():
    with torch.device("meta"):
        model = AutoEncoder(VAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert len(model.state_dict()) == 244
    with torch.device("meta"):
        latents = model.encode(torch.empty(1, 3, 512, 768))
        assert latents.shape == (1, 16, 64, 96)
        assert model.decode(latents).shape == (1, 3, 512, 768)


def test_two_pictures_in_a_batch_are_the_two_alone():
    model, x = autoencoder(), pictures(2, 3, 16, 24)
    alone = torch.cat([model.encode(x[:1]), model.encode(x[1:])])
    torch.testing.assert_close(model.encode(x), alone, atol=TOLERANCE, rtol=TOLERANCE)
    shown = torch.cat([model.decode(alone[:1]), model.decode(alone[1:])])
    torch.testing.assert_close(model.decode(alone), shown, atol=TOLERANCE, rtol=TOLERANCE)


def test_sides_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="30 x 24 pixels .* multiples of 4; resize it first"):
        autoencoder().encode(pictures(1, 3, 30, 24))


def test_a_width_that_cannot_be_normalised_is_named():
    with pytest.raises(ConfigError, match="vae ch 48 is not a multiple of 32"):
        VAEConfig(ch=48)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder's VAE."""
    save_file(autoencoder().state_dict(), tmp_path / "ae.safetensors")
    sizes = {"ch": 32, "ch_mult": [1, 2, 2], "z_channels": 4, "downsample": 4}
    (tmp_path / "vae_config.json").write_text(json.dumps(sizes))
    return tmp_path


def test_a_folder_opens(folder):
    model = load_autoencoder(folder, dtype=torch.bfloat16)
    assert model.config == TINY
    expected = autoencoder().state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].bfloat16()), key


def test_what_does_not_fit_is_named(folder):
    (folder / "vae_config.json").unlink()  # so the full size is expected
    with pytest.raises(CheckpointError, match=r"48 missing \(first: decoder.up.1.block"):
        load_autoencoder(folder)
    sizes = {"ch": 64, "ch_mult": [1, 2, 2], "z_channels": 4}
    (folder / "vae_config.json").write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError, match=r"has shape .* the configuration asks for"):
        load_autoencoder(folder)
    (folder / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="ae.safetensors is missing: this checkpoint cannot"):
        load_autoencoder(folder)
