"""Key names and shapes at full size, from a rule-based description of the released checkpoint."""

import math

import torch

from modeling.bagel import Bagel
from modeling.pretrained import RECOMPUTED, is_generation_key
from tests.golden_checks.names import FULL_SIZE

D, FF, V = 3584, 18_944, 152_064
VIT_D, VIT_FF = 1152, 4304


def decoder_keys(suffix):
    keys = {}
    for n in range(28):
        layer = f"language_model.model.layers.{n}"
        for name, width in (("q", 3584), ("k", 512), ("v", 512)):
            keys[f"{layer}.self_attn.{name}_proj{suffix}.weight"] = (width, D)
            keys[f"{layer}.self_attn.{name}_proj{suffix}.bias"] = (width,)
        keys[f"{layer}.self_attn.o_proj{suffix}.weight"] = (D, D)
        for name in ("q", "k"):
            keys[f"{layer}.self_attn.{name}_norm{suffix}.weight"] = (128,)
        for name, shape in (("gate", (FF, D)), ("up", (FF, D)), ("down", (D, FF))):
            keys[f"{layer}.mlp{suffix}.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            keys[f"{layer}.{name}_layernorm{suffix}.weight"] = (D,)
    return keys | {f"language_model.model.norm{suffix}.weight": (D,)}


def vision_keys():
    model = "vit_model.vision_model"
    keys = {
        f"{model}.embeddings.patch_embedding.weight": (VIT_D, 588),
        f"{model}.embeddings.patch_embedding.bias": (VIT_D,),
        f"{model}.embeddings.position_embedding.weight": (4900, VIT_D),
        "connector.fc1.weight": (D, VIT_D),
        "connector.fc1.bias": (D,),
        "connector.fc2.weight": (D, D),
        "connector.fc2.bias": (D,),
        "vit_pos_embed.pos_embed": (4900, D),
    }
    shapes = {f"self_attn.{n}_proj": (VIT_D, VIT_D) for n in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (VIT_FF, VIT_D), "mlp.fc2": (VIT_D, VIT_FF)}
    norms = [f"{model}.post_layernorm"]
    for n in range(26):
        layer = f"{model}.encoder.layers.{n}"
        for name, shape in shapes.items():
            keys[f"{layer}.{name}.weight"], keys[f"{layer}.{name}.bias"] = shape, shape[:1]
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    for norm in norms:
        keys[f"{norm}.weight"] = keys[f"{norm}.bias"] = (VIT_D,)
    return keys


LATENT_KEYS = {
    "time_embedder.mlp.0.weight": (D, 256),
    "time_embedder.mlp.0.bias": (D,),
    "time_embedder.mlp.2.weight": (D, D),
    "time_embedder.mlp.2.bias": (D,),
    "vae2llm.weight": (D, 64),
    "vae2llm.bias": (D,),
    "llm2vae.weight": (64, D),
    "llm2vae.bias": (64,),
    "latent_pos_embed.pos_embed": (4096, D),
}
TEXT_KEYS = {
    "language_model.model.embed_tokens.weight": (V, D),
    "language_model.lm_head.weight": (V, D),
}
UNDERSTANDING = TEXT_KEYS | decoder_keys("") | vision_keys()


def shapes(**parts):
    with torch.device("meta"):
        model = Bagel(FULL_SIZE, **parts)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def total(keys):
    return sum(math.prod(shape) for shape in keys.values())


def test_every_key_and_shape_of_the_full_model():
    found = shapes(visual_gen=True)
    assert found == UNDERSTANDING | decoder_keys("_moe_gen") | LATENT_KEYS
    assert len(found) == 1223 and total(found) == 14_607_260_128


def test_parts_that_are_not_built_have_no_keys():
    assert shapes(generation_expert=False) == UNDERSTANDING
    assert shapes() == UNDERSTANDING | decoder_keys("_moe_gen")
    assert len(LATENT_KEYS) == 9


def test_experts_mirror_each_other():
    und, gen = decoder_keys(""), decoder_keys("_moe_gen")
    assert total(und) == total(gen) == 6_525_628_928
    assert all(is_generation_key(key) for key in gen) and all(map(is_generation_key, LATENT_KEYS))
    assert not any(map(is_generation_key, UNDERSTANDING))


def test_only_the_fixed_tables_are_constants():
    with torch.device("meta"):
        model = Bagel(FULL_SIZE, visual_gen=True)
    constants = model.state_dict().keys() - {name for name, _ in model.named_parameters()}
    assert constants == set(RECOMPUTED)
    assert sum(math.prod(model.state_dict()[key].shape) for key in constants) == 32_241_664
