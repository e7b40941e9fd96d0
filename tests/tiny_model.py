"""A miniature model with random weights and a byte tokenizer, for tests that need a whole Bagel."""

import torch

from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from modeling.sequence import Image
from modeling.tokenizer import SpecialTokens

TOKENS = SpecialTokens(bos=500, eos=501, image_start=502, image_end=503)
TINY_CONFIG = BagelConfig(
    llm=LLMConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    vit=ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=4,
        image_size=32,
    ),
    max_latent_size=8,
)
# Latent tokens of 4x4 pixels, whose 16 channels are what the model's latent heads take.
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)


class FakeTokenizer:
    """id = 16 + utf8 byte; framing ids decode to their markers, other ids to '?'."""

    vocab_size = 512

    def __init__(self, special: SpecialTokens = TOKENS) -> None:
        self.special = special
        self.markers = {
            special.bos: "<|im_start|>",
            special.eos: "<|im_end|>",
            special.image_start: "<|vision_start|>",
            special.image_end: "<|vision_end|>",
        }

    def encode(self, text: str) -> list[int]:
        return [16 + byte for byte in text.encode()]

    def decode(self, token_ids) -> str:
        return "".join(
            self.markers.get(i) or (chr(i - 16) if 16 <= i < 144 else "?") for i in token_ids
        )


def randomise_(model: Bagel, seed: int = 0) -> Bagel:
    """Weights that hide nothing: matrices at a lively scale, norms away from 1, biases from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fan_in = 1.0 if "embed" in name else parameter.shape[-1] ** 0.5
            value = noise / fan_in
        else:
            scale = name.endswith("weight")  # of a norm
            value = 0.2 * noise + (1.0 if scale else 0.0)
        parameter.data.copy_(value)
    return model


def tiny_bagel(seed: int = 0, visual_gen: bool = False) -> Bagel:
    return randomise_(Bagel(TINY_CONFIG, visual_gen=visual_gen), seed).eval()


@torch.no_grad()
def tiny_drawer(seed: int = 0) -> Bagel:
    """A model with latent heads whose pictures depend on the context as much as on themselves."""
    model = tiny_bagel(seed, visual_gen=True)
    for name, parameter in model.named_parameters():
        if "q_norm_moe_gen" in name:
            parameter.mul_(6)
        elif "o_proj_moe_gen" in name:
            parameter.mul_(30)
    model.vae2llm.weight.mul_(3)
    return model.requires_grad_(False)


def tiny_autoencoder(seed: int = 0) -> AutoEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoEncoder(TINY_VAE).requires_grad_(False)


def random_image(height: int, width: int, seed: int = 0, patch_dim: int = 48) -> Image:
    """height and width in patches."""
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.randn(height * width, patch_dim, generator=generator), height, width)
