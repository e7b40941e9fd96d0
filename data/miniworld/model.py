"""The miniature model before training: its shape, its initial weights, its checkpoint folder.

Over a 4x4 grid of patches the fixed 2-D sin-cos table of the full-size model hardly varies, and
tiny embeddings of the usual 0.02 keep attention flat for thousands of steps. Position therefore
reaches the decoder through the image encoder's learned table, initialised as row + column vectors,
and text and image tokens start at comparable scales.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data.miniworld.tokenizer import save_tokenizer
from data.processor import Processor
from data.prompts import MINI
from data.transforms import ImageTransform
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.pretrained import save_pretrained
from modeling.tokenizer import load_tokenizer

TRANSFORM = ImageTransform(
    max_image_size=56, min_image_size=56, image_stride=14, max_pixels=56 * 56
)
EMBEDDING_STD = 0.3  # token embeddings and position table
CONNECTOR_GAIN = 3.0


def mini_config(vocab_size: int) -> BagelConfig:
    """About 1.0 M parameters in the understanding path."""
    return BagelConfig(
        llm=LLMConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        vit=ViTConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,  # on disk; the last one is never run
            num_attention_heads=4,
            image_size=56,
        ),
    )


@torch.no_grad()
def initialise(model: Bagel, seed: int) -> None:
    """Random weights in place: fan-in scaled matrices, factored table, larger embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    embedding = model.language_model.model.embed_tokens.weight
    embedding.normal_(0.0, EMBEDDING_STD, generator=generator)
    table = model.vit_model.vision_model.embeddings.position_embedding.weight
    table.copy_(_factored_table(model.config.vit.patches_per_side, table.shape[1], generator))
    model.connector.fc2.weight.mul_(CONNECTOR_GAIN)


def _factored_table(side: int, width: int, generator: torch.Generator) -> Tensor:
    """(side * side, width): a random vector per row plus one per column."""
    rows, columns = torch.randn(2, side, width, generator=generator) * EMBEDDING_STD
    return (rows[:, None] + columns[None, :]).reshape(side * side, width)


def write_untrained(path: str | Path, seed: int) -> None:
    """A checkpoint folder in the released layout, both experts, ready for `train.sft`."""
    save_tokenizer(path)
    processor = Processor(load_tokenizer(path), TRANSFORM, MINI)
    processor.save_pretrained(path)
    model = Bagel(mini_config(processor.tokenizer.vocab_size))
    initialise(model, seed)
    copy_understanding_expert(model)
    save_pretrained(model.state_dict(), model.config, path, dtype=torch.float32)


@torch.no_grad()
def copy_understanding_expert(model: Bagel) -> None:
    """Start the generation expert as a copy of the understanding expert, as released training
    does.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if "_moe_gen" in name:
            parameter.copy_(parameters[name.replace("_moe_gen", "")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    args = parser.parse_args()
    write_untrained(args.output, args.seed)
    print(f"untrained miniature model: {args.output}")


if __name__ == "__main__":
    main()
