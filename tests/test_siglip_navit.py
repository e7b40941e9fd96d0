"""The image encoder against `transformers` SigLIP, and packing of several pictures."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from modeling.attention import packed_plan
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.layers import patch_position_ids
from modeling.sequence import Split
from modeling.siglip_navit import SiglipNaViT
from tests.tiny_model import randomise_

PATCH, SIDE, LAYERS = 4, 6, 3
VIT = ViTConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=LAYERS + 1,  # one more on disk than is used
    num_attention_heads=3,
    patch_size=PATCH,
    image_size=PATCH * SIDE,
)
CONFIG = BagelConfig(LLMConfig(8, 8, 8, 1, 1, 1), VIT)


def encoder():
    return randomise_(SiglipNaViT(CONFIG), seed=2).requires_grad_(False)


def flat_patches(pixels):
    """(3, H, W) -> rows of row, column, channel, cut out one by one."""
    _, height, width = pixels.shape
    return torch.stack(
        [
            pixels[:, y : y + PATCH, x : x + PATCH].permute(1, 2, 0).flatten()
            for y in range(0, height, PATCH)
            for x in range(0, width, PATCH)
        ]
    )


def test_agrees_with_transformers_siglip():
    ours = encoder()
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            patch_size=PATCH,
            image_size=PATCH * SIDE,
            layer_norm_eps=1e-6,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
    ).eval()
    state = {k.removeprefix("vision_model."): v for k, v in ours.state_dict().items()}
    flat = state["embeddings.patch_embedding.weight"]  # (D, rows * columns * channels)
    conv = flat.view(24, PATCH, PATCH, 3).permute(0, 3, 1, 2)
    state["embeddings.patch_embedding.weight"] = conv
    body = getattr(theirs, "vision_model", theirs)
    missing, unexpected = body.load_state_dict(state, strict=False)
    assert not unexpected and not [key for key in missing if "position_ids" not in key]
    pixels = torch.randn(3, PATCH * SIDE, PATCH * SIDE)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels[None]).last_hidden_state[0]
    plan = packed_plan([(Split(SIDE**2, "full"),)], "cpu")
    ids = patch_position_ids(SIDE, SIDE, SIDE)
    torch.testing.assert_close(ours(flat_patches(pixels), ids, plan), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_pictures_of_a_pack_do_not_see_each_other(backend):
    model, grids = encoder(), [(2, 3), (4, 2), (1, 1)]
    pictures = [torch.randn(h * w, 48) for h, w in grids]
    ids = [patch_position_ids(h, w, SIDE) for h, w in grids]

    def run(which):
        samples = [(Split(len(pictures[i]), "full"),) for i in which]
        plan = packed_plan(samples, "cpu", backend)
        return model(
            torch.cat([pictures[i] for i in which]), torch.cat([ids[i] for i in which]), plan
        )

    alone = torch.cat([run([i]) for i in range(3)])
    torch.testing.assert_close(run([0, 1, 2]), alone, atol=1e-5, rtol=0)
    pictures[2] = pictures[2] + 1
    changed = run([0, 1, 2])
    torch.testing.assert_close(changed[:-1], alone[:-1], atol=1e-5, rtol=0)
    assert (changed[-1] - alone[-1]).abs().max() > 0.01


def test_layers_used_follow_the_selected_layer():
    assert CONFIG.vit_layers_used == LAYERS == len(encoder().vision_model.encoder.layers)
