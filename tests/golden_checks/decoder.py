"""b, c, d: packing, masks, forward and backward of the decoder, with both experts."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.attention import FlexPlan, SDPAPlan, split_mask
from modeling.bagel import Bagel, latent_position_ids, text_logits
from modeling.drawing import encode
from modeling.flow import noised, shifted
from modeling.layers import patch_position_ids, patchify
from modeling.sequence import Image, Latent, PackedBatch, Segment, Split, Text, pack
from tests.golden_checks.core import (
    HIDDEN,
    LOSS,
    VAE,
    Golden,
    Result,
    check,
    close,
    exact,
    gradient_results,
)

MODEL = ("model.safetensors", "config.json")
VAE_MODEL = (*MODEL, "ae.safetensors")


def _files(name: str) -> tuple[str, ...]:
    return (f"{name}.safetensors", f"{name}.json", *VAE_MODEL)


# ---- b: understanding forward and backward ----------------------------------------------------


@check("b_train_single", "b_train_single.safetensors", "b_train_single.json", *MODEL)
def train_single(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "b_train_single")


@check("b_train_multi", "b_train_multi.safetensors", "b_train_multi.json", *MODEL)
def train_multi(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "b_train_multi")


# ---- c: the same with latents ------------------------------------------------------------------


@check("c_train_gen_single", *_files("c_train_gen_single"))
def train_gen_single(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "c_train_gen_single", visual_gen=True)


@check("c_train_gen_multi", *_files("c_train_gen_multi"))
def train_gen_multi(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "c_train_gen_multi", visual_gen=True)


def _train(golden: Golden, name: str, visual_gen: bool = False) -> Iterator[Result]:
    stored, facts = golden.tensors(name), golden.json(name)
    model = golden.model(visual_gen)
    latents: list[Latent] = []
    if visual_gen:
        grids = encode(golden.autoencoder(), stored["in.padded_images"], stored["in.vae_noise"])
        yield close(f"{name}.latents", VAE, [(grids, stored["in.padded_latent"])])
        latents = read_latents(golden, stored, facts)
    samples = read_segments(golden, stored, facts["sample_lens"], latents=latents)
    batch = pack(samples, golden.tokens)
    yield from pack_results(name, golden, batch, stored, "in.")

    embeddings = model.embed(batch)
    layers = collect_layers(model)
    hidden = model.hidden_states(embeddings, batch)
    logits = text_logits(hidden[batch.loss_rows], model.language_model.lm_head)
    yield close(f"{name}.lm_input", HIDDEN, [(embeddings, stored["out.lm_input"])])
    if "out.layer0" in stored:
        yield close(f"{name}.layers", HIDDEN, layer_pairs(layers, stored))
    yield close(f"{name}.last_hidden_state", HIDDEN, [(hidden, stored["out.last_hidden_state"])])
    yield close(f"{name}.logits", HIDDEN, [(logits, stored["out.logits"])])
    ce = F.cross_entropy(logits, batch.labels, reduction="none")
    yield close(f"{name}.ce", LOSS, [(ce, stored["out.ce"])])
    weights = batch.loss_weights if "weight" in facts["loss_def"] else torch.ones_like(ce)
    loss = (ce * weights).sum() / weights.sum()
    if visual_gen:
        mse = (model.llm2vae(hidden[batch.flow_rows]) - batch.targets).square()
        yield close(f"{name}.mse", LOSS, [(mse, stored["out.mse"])])
        loss = loss + mse.mean()
    yield close(f"{name}.loss", LOSS, [(loss, facts["loss"])])
    loss.backward()
    full = {k.removeprefix("grad."): v for k, v in stored.items() if k.startswith("grad.")}
    yield from gradient_results(name, model, facts["grad_norms"], full)


def read_latents(golden: Golden, stored: dict[str, Tensor], facts: dict) -> list[Latent]:
    """The pictures behind stored packs: cut out of the padding, noised where they are learned."""
    patch = golden.config["bagel"]["latent_patch_size"]
    shapes = facts["patchified_vae_latent_shapes"]
    sizes = [height * width for height, width in shapes]
    raw = stored["in.packed_timesteps"].split(sizes)
    noises = stored["in.flow_noise"].split(sizes)
    latents = []
    for grid, (height, width), times, noise in zip(
        stored["in.padded_latent"], shapes, raw, noises, strict=True
    ):
        clean = patchify(grid[:, : height * patch, : width * patch], patch)
        if times[0] == -math.inf:
            latents.append(Latent(clean, height, width))
            continue
        time = shifted(torch.sigmoid(times[0]), golden.config["bagel"]["timestep_shift"])
        x, target = noised(clean, noise, time)
        latents.append(Latent(x, height, width, float(time), target))
    return latents


def read_segments(
    golden: Golden,
    stored: dict[str, Tensor],
    sample_lens: list[int],
    prefix: str = "in.",
    latents: Sequence[Latent] = (),
) -> list[list[Segment]]:
    """The segments behind stored packs: ids between markers, patches, grids from position ids.

    Which blocks carry a loss is read from the loss rows; labels of text, weights, rotary positions
    and masks are not used, so that comparing them afterwards means something.
    """
    tokens = golden.tokens
    side = golden.config["vit"]["image_size"] // golden.config["vit"]["patch_size"]
    ids = stored[f"{prefix}packed_text_ids"].tolist()
    places = stored[f"{prefix}packed_text_indexes"].tolist()
    loss_rows = set(stored[f"{prefix}ce_loss_indexes"].tolist())
    labels = dict(
        zip(
            stored[f"{prefix}ce_loss_indexes"].tolist(),
            stored[f"{prefix}packed_label_ids"].tolist(),
            strict=True,
        )
    )
    patches = iter(
        zip(
            stored[f"{prefix}packed_vit_tokens"].split(
                stored[f"{prefix}vit_token_seqlens"].tolist()
            ),
            stored[f"{prefix}packed_vit_position_ids"].split(
                stored[f"{prefix}vit_token_seqlens"].tolist()
            ),
            strict=True,
        )
    )
    pictures, learned = iter(latents), stored.get(f"{prefix}packed_vae_token_indexes")
    drawn = set() if learned is None else set(learned.tolist())
    ends = torch.tensor(sample_lens).cumsum(0).tolist()
    samples: list[list[Segment]] = [[] for _ in ends]
    at = 0
    while at < len(ids):
        sample = next(i for i, end in enumerate(ends) if places[at] < end)
        if ids[at] == tokens.image_start and places[at] + 1 in drawn:
            end_label = labels.get(places[at + 1])
            samples[sample].append(dataclasses.replace(next(pictures), end_label=end_label))
            at += 2
            continue
        if ids[at] == tokens.image_start:
            tensor, positions = next(patches)
            height = int(positions.max()) // side + 1
            samples[sample].append(Image(tensor, height, len(tensor) // height))
            at += 2
            continue
        stop = ids.index(tokens.eos, at)
        end_label = labels.get(places[stop])
        content = tuple(ids[at + 1 : stop])
        samples[sample].append(Text(content, places[at] in loss_rows, end_label))
        at = stop + 1
    return samples


def pack_results(
    name: str, golden: Golden, batch: PackedBatch, stored: dict[str, Tensor], prefix: str
) -> Iterator[Result]:
    """`compare_pack` with the tables of the stored model."""
    side = golden.config["vit"]["image_size"] // golden.config["vit"]["patch_size"]
    latent_side = golden.config["bagel"]["max_latent_size"]
    yield from compare_pack(name, batch, stored, prefix, side, latent_side)


def compare_pack(
    name: str,
    batch: PackedBatch,
    stored: dict[str, Tensor],
    prefix: str,
    side: int,
    latent_side: int = 0,
) -> Iterator[Result]:
    """Index tensors, masks and pixels exactly, loss weights closely.

    Args:
        prefix: of the stored names.
        side, latent_side: of the tables of patch and latent positions.
    """
    vit_ids = torch.cat([patch_position_ids(h, w, side) for h, w in batch.image_grids])
    ours = {
        "packed_text_ids": batch.token_ids,
        "packed_text_indexes": batch.token_index,
        "packed_position_ids": batch.position_ids,
        "packed_vit_token_indexes": batch.patch_index,
        "packed_vit_position_ids": vit_ids,
        "vit_token_seqlens": torch.tensor([h * w for h, w in batch.image_grids]),
        "ce_loss_indexes": batch.loss_rows,
        "packed_label_ids": batch.labels,
    }
    if batch.latent_grids:
        places = [latent_position_ids(h, w, latent_side) for h, w in batch.latent_grids]
        ours |= {
            "packed_vae_token_indexes": batch.latent_index,
            "packed_latent_position_ids": torch.cat(places),
            "mse_loss_indexes": batch.flow_rows,
        }
    yield exact(f"{name}.pack", [(ours[key], stored[prefix + key]) for key in ours])
    weights = [(batch.loss_weights, stored[f"{prefix}ce_loss_weights"])]
    yield close(f"{name}.loss_weights", 1e-7, weights)
    if f"{prefix}packed_vit_tokens" in stored:
        patches = [(batch.patches, stored[f"{prefix}packed_vit_tokens"])]
        yield close(f"{name}.patches", 0.0, patches)
    if f"{prefix}mask0" in stored:
        masks = [
            (split_mask(splits), stored[f"{prefix}mask{i}"])
            for i, splits in enumerate(batch.samples)
        ]
        yield exact(f"{name}.masks", masks)


def collect_layers(model: Bagel) -> list[Tensor]:
    """Outputs of the decoder layers, filled by the next forward."""
    layers: list[Tensor] = []
    for layer in model.language_model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
    return layers


def layer_pairs(layers: list[Tensor], stored: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(x, stored[f"out.layer{i}"]) for i, x in enumerate(layers)]


# ---- d: masks ----------------------------------------------------------------------------------


@check("d_masks", "d_masks.safetensors", "d_masks.json")
def masks(golden: Golden) -> Iterator[Result]:
    stored, facts = golden.tensors("d_masks"), golden.json("d_masks")
    dense, sdpa, flex = [], [], []
    for name, fact in facts.items():
        if "docs" in fact:
            docs = [*fact["docs"], [[fact["pad"]], ["causal"]]]
        else:
            docs = [[fact["split_lens"], fact["attn_modes"]]]
        samples = [tuple(Split(n, mode) for n, mode in zip(*doc, strict=True)) for doc in docs]
        expected = stored[f"{name}_dense" if "docs" in fact else name]
        dense.append((torch.block_diag(*map(split_mask, samples)), expected))
        sdpa.append((torch.block_diag(*map(_sdpa_mask, samples)), expected))
        flex.append((_flex_mask(samples), stored[f"{name}_flex"]))
    yield exact("d_masks.dense", dense)
    yield exact("d_masks.sdpa", sdpa)
    yield exact("d_masks.flex", flex)


def _sdpa_mask(splits: tuple[Split, ...]) -> Tensor:
    length = sum(split.length for split in splits)
    mask = SDPAPlan([splits], "cpu").mask
    return torch.ones(length, length, dtype=torch.bool) if mask is None else mask[0, 0]


def _flex_mask(samples: list[tuple[Split, ...]]) -> Tensor:
    """The predicate of the FlexAttention plan, evaluated on the whole grid."""
    length = sum(split.length for splits in samples for split in splits)
    grid = torch.arange(length)
    predicate = FlexPlan(samples, "cpu").block_mask.mask_mod
    return predicate(torch.tensor(0), torch.tensor(0), grid[:, None], grid[None, :])
