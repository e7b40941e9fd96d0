"""The miniature model before training: its shape, its initial weights, its checkpoint folder.

Looking something up in a picture (which tile is red? what lies on b3?) forms late and suddenly in
so small a model, unless the first attention layer can tell patches apart. Four things in the
initial weights bring it within reach of a laptop: the image encoder starts as a per-patch encoder
(its residual branches at zero) whose input weighs a patch's mean colour like its details; position
comes from its learned table, initialised as row + column vectors (over a 4x4 grid the fixed sin-cos
table of the full-size model hardly varies); image tokens are centred and start at unit scale; and
queries are scaled up, because after QK-norm attention could otherwise not become sharp for a
thousand steps. The latent heads start in the same spirit: what is constant in flow time and in the
fixed table of positions is taken out, so that times and places differ.
"""

import argparse
import dataclasses
import random
from pathlib import Path

import torch
from torch import Tensor, nn

from data.miniworld import autoencoder
from data.miniworld.art import CELL, blank_board, picture
from data.miniworld.record import GRID
from data.miniworld.tokenizer import save_tokenizer
from data.miniworld.world import TASKS, draw
from data.processor import Processor
from data.prompts import MINI
from data.transforms import ImageTransform
from modeling.bagel import Bagel, latent_position_ids
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.layers import patchify
from modeling.pretrained import load_pretrained, save_pretrained
from modeling.sequence import pack
from modeling.tokenizer import load_tokenizer

TRANSFORM = ImageTransform(
    max_image_size=56, min_image_size=56, image_stride=14, max_pixels=56 * 56
)
TOKEN_STD = 0.3
POSITION_STD = 1.0  # of the row and of the column vectors of the image encoder's table
DETAIL_GAIN = 4.0  # patch embedding: fan-in scaled noise ...
COLOUR_GAIN = 2.0  # ... plus random directions for the three channel means
QUERY_GAIN = 4.0  # initial q_norm weight
LATENT_GAIN = 0.3  # of a latent token's content and flow time, beside positions that vary by .2
CALIBRATION_DRAWS = 64  # items per task family whose pictures centre and scale image tokens


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
def initialise(model: Bagel, processor: Processor, seed: int) -> None:
    """Random weights in place, as the module docstring says; everything else is fan-in scaled."""
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.llm.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        if name.startswith("vit_model.") and name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.zero_()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_((2 * depth) ** -0.5)  # the sum over layers starts at unit scale
        elif name.endswith("q_norm.weight"):
            parameter.mul_(QUERY_GAIN)
    model.language_model.model.embed_tokens.weight.normal_(0.0, TOKEN_STD, generator=generator)
    embeddings = model.vit_model.vision_model.embeddings
    _initialise_patches(embeddings.patch_embedding, model.config.vit.num_channels, generator)
    table = embeddings.position_embedding.weight
    table.copy_(_factored_table(model.config.vit.patches_per_side, table.shape[1], generator))
    _calibrate_images(model, processor, seed)
    if model.can_draw:
        initialise_latents(model, seed)


@torch.no_grad()
def initialise_latents(model: Bagel, seed: int) -> None:
    """Latent heads: velocity zero at first, as in released training; see the module docstring."""
    generator = torch.Generator().manual_seed(seed)
    into, out = model.vae2llm, model.llm2vae
    first, _, second = model.time_embedder.mlp
    for linear in (into, first, second):
        linear.weight.normal_(0.0, linear.in_features**-0.5, generator=generator)
        linear.bias.zero_()
    out.weight.zero_()
    out.bias.zero_()
    into.weight.mul_(LATENT_GAIN)
    grid = latent_position_ids(GRID, GRID, model.config.max_latent_size)
    into.bias.copy_(-model.latent_pos_embed(grid).mean(0))
    over_time = model.time_embedder(torch.linspace(0, 1, 100))
    scale = LATENT_GAIN / (over_time - over_time.mean(0)).square().mean().sqrt()
    second.weight.mul_(scale)
    second.bias.copy_(-over_time.mean(0) * scale)


def _initialise_patches(embedding: nn.Linear, channels: int, generator: torch.Generator) -> None:
    """Details, channel means, and a bias that maps an empty cell to zero."""
    pixels = embedding.in_features // channels
    directions = torch.randn(embedding.out_features, 1, channels, generator=generator)
    means = (COLOUR_GAIN * directions / pixels).expand(-1, pixels, -1).flatten(1)
    embedding.weight.mul_(DETAIL_GAIN).add_(means)
    empty = patchify(TRANSFORM(picture(blank_board())), CELL)[0]
    embedding.bias.copy_(-embedding.weight @ empty)


def _calibrate_images(model: Bagel, processor: Processor, seed: int) -> None:
    """Shift and scale the connector's output: zero mean and unit rms over the miniature's
    pictures.
    """
    rng = random.Random(seed)
    records = [draw(task, rng) for task in TASKS for _ in range(CALIBRATION_DRAWS)]
    pictures = [p for record in records for p in (record.problem_image, record.visual_thought)]
    segments = [[processor.transform.segment(picture)] for picture in pictures]
    batch = pack(segments, processor.tokenizer.special)
    output = model.connector.fc2
    output.bias.sub_(model.encode_images(batch).mean(0))
    scale = model.encode_images(batch).square().mean().rsqrt()
    output.weight.mul_(scale)
    output.bias.mul_(scale)


def _factored_table(side: int, width: int, generator: torch.Generator) -> Tensor:
    """(side * side, width): a random vector per row plus one per column."""
    rows, columns = torch.randn(2, side, width, generator=generator) * POSITION_STD
    return (rows[:, None] + columns[None, :]).reshape(side * side, width)


def write_untrained(path: str | Path, seed: int) -> None:
    """A checkpoint folder in the released layout, both experts and the latent heads, ready for
    `train.sft`.
    """
    save_tokenizer(path)
    processor = Processor(load_tokenizer(path), TRANSFORM, MINI, autoencoder.TRANSFORM)
    processor.save_pretrained(path)
    model = Bagel(mini_config(processor.tokenizer.vocab_size), visual_gen=True)
    initialise(model, processor, seed)
    copy_understanding_expert(model)
    save_pretrained(dict(model.named_parameters()), model.config, path)  # no tables


def write_undrawn(base: str | Path, path: str | Path, seed: int) -> None:
    """A checkpoint folder with the understanding path of `base`, its copy for the generation
    expert, and untrained latent heads.
    """
    processor = Processor.from_pretrained(base)
    dataclasses.replace(processor, vae_transform=autoencoder.TRANSFORM).save_pretrained(path)
    trained = load_pretrained(base)
    model = Bagel(trained.config, visual_gen=True)
    model.load_state_dict(trained.state_dict(), strict=False)
    initialise_latents(model, seed)
    copy_understanding_expert(model)
    save_pretrained(dict(model.named_parameters()), model.config, path)  # no tables


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
    parser.add_argument(
        "--understanding", help="checkpoint folder whose understanding path to take"
    )
    args = parser.parse_args()
    if args.understanding:
        write_undrawn(args.understanding, args.output, args.seed)
        print(f"miniature model that has not learned to draw: {args.output}")
        return
    write_untrained(args.output, args.seed)
    print(f"untrained miniature model: {args.output}")


if __name__ == "__main__":
    main()
