"""The miniature model before training: its shape, its initial weights, its checkpoint folder.

Looking something up in a picture (which tile is red? what lies on b3?) forms late and suddenly in
so small a model, unless the first attention layer can tell patches apart. Four things in the
initial weights bring it within reach of a laptop: the image encoder starts as a per-patch encoder
(its residual branches at zero) whose input weighs a patch's mean colour like its details; position
comes from its learned table, initialised as row + column vectors (over a 4x4 grid the fixed sin-cos
table of the full-size model hardly varies); image tokens are centred and start at unit scale; and
queries are scaled up, because after QK-norm attention could otherwise not become sharp for a
thousand steps. The latent heads start in the same spirit: what is constant in flow time and in the
fixed table of positions is taken out, and contents and times stay out of the few directions in
which places differ, where the first layer of the generation expert looks for them.
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
TIME_GAIN = 0.5  # of flow time in a latent token, beside contents at unit scale
PLACE_DIRECTIONS = 8  # in which the places of the grid vary most
FAST_FREQUENCIES = 5  # of rotary positions, which turn over the length of a row
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
        latent_channels=autoencoder.CONFIG.z_channels,
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
    places, directions = _places(model)
    elsewhere = torch.eye(places.shape[1]) - directions.T @ directions
    into.weight.copy_(elsewhere @ into.weight)
    into.bias.copy_(-places.mean(0))
    second.weight.copy_(elsewhere @ second.weight)
    over_time = model.time_embedder(torch.linspace(0, 1, 100))
    scale = TIME_GAIN / (over_time - over_time.mean(0)).square().mean().sqrt()
    second.weight.mul_(scale)
    second.bias.copy_(-over_time.mean(0) * scale)


def _places(model: Bagel) -> tuple[Tensor, Tensor]:
    """Fixed positions of the grid (16, D), and the directions (PLACE_DIRECTIONS, D) in which they
    differ most.
    """
    table = model.latent_pos_embed
    places = table(latent_position_ids(GRID, GRID, table.side))
    return places, torch.linalg.svd(places - places.mean(0)).Vh[:PLACE_DIRECTIONS]


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
    initialise_generation_expert(model, seed)
    save_pretrained(dict(model.named_parameters()), model.config, path)  # no tables


def write_undrawn(base: str | Path, path: str | Path, seed: int) -> None:
    """A checkpoint folder with the understanding path of `base`, its copy for the generation
    expert, and untrained latent heads.
    """
    processor = Processor.from_pretrained(base)
    dataclasses.replace(processor, vae_transform=autoencoder.TRANSFORM).save_pretrained(path)
    trained = load_pretrained(base)
    channels = autoencoder.CONFIG.z_channels
    config = dataclasses.replace(trained.config, latent_channels=channels)
    model = Bagel(config, visual_gen=True)
    model.load_state_dict(model.state_dict() | trained.state_dict())
    initialise_latents(model, seed)
    initialise_generation_expert(model, seed)
    save_pretrained(dict(model.named_parameters()), model.config, path)  # no tables


@torch.no_grad()
def initialise_generation_expert(model: Bagel, seed: int) -> None:
    """A copy of the understanding expert, as in released training, but for the queries and keys of
    its first layer: they are alike and see places only, so that a latent token looks at the same
    cell of the pictures before it, which is where most of a visual thought comes from.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if "_moe_gen" in name:
            parameter.copy_(parameters[name.replace("_moe_gen", "")])
    generator = torch.Generator().manual_seed(seed)
    attention = model.language_model.model.layers[0].self_attn
    queries, keys = attention.q_proj_moe_gen, attention.k_proj_moe_gen
    heads, size = keys.out_features // attention.head_dim, attention.head_dim
    _, directions = _places(model)
    look = torch.randn(heads, size, PLACE_DIRECTIONS, generator=generator)
    fast = torch.arange(size) % (size // 2) < FAST_FREQUENCIES
    look[:, fast] = 0.0  # these rotate with the distance between two pictures
    keys.weight.copy_((look @ directions).flatten(0, 1))
    groups = queries.out_features // keys.out_features
    queries.weight.copy_(
        keys.weight.view(heads, size, -1).repeat_interleave(groups, 0).flatten(0, 1)
    )
    for part in (queries, keys):
        part.bias.zero_()
    attention.q_norm_moe_gen.weight.fill_(QUERY_GAIN)
    attention.k_norm_moe_gen.weight.fill_(1.0)


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
