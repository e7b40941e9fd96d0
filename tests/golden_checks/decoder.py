"""b, c, d, e: packing, masks, decoder forward and backward, cached prefill."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.attention import FlexPlan, SDPAPlan, packed_plan, split_mask
from modeling.bagel import Bagel, text_logits
from modeling.kv_cache import KVCache
from modeling.layers import patch_position_ids
from modeling.qwen2_mot import Route
from modeling.sequence import Image, PackedBatch, Segment, Split, Text, pack
from tests.golden_checks.core import (
    CACHE,
    HIDDEN,
    LOSS,
    Golden,
    Result,
    check,
    close,
    exact,
    gradient_results,
)

MODEL = ("model.safetensors", "config.json")


# ---- b: understanding forward and backward ----------------------------------------------------


@check("b_train_single", "b_train_single.safetensors", "b_train_single.json", *MODEL)
def train_single(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "b_train_single")


@check("b_train_multi", "b_train_multi.safetensors", "b_train_multi.json", *MODEL)
def train_multi(golden: Golden) -> Iterator[Result]:
    yield from _train(golden, "b_train_multi")


def _train(golden: Golden, name: str) -> Iterator[Result]:
    stored, facts = golden.tensors(name), golden.json(name)
    model = golden.model()
    samples = read_segments(golden, stored, facts["sample_lens"])
    batch = pack(samples, golden.tokens)
    yield from pack_results(name, golden, batch, stored, "in.")

    embeddings = model.embed(batch)
    layers = collect_layers(model)
    hidden = model.hidden_states(embeddings, batch)
    logits = text_logits(hidden[batch.loss_rows], model.language_model.lm_head)
    yield close(f"{name}.lm_input", HIDDEN, [(embeddings, stored["out.lm_input"])])
    yield close(f"{name}.layers", HIDDEN, layer_pairs(layers, stored))
    yield close(f"{name}.last_hidden_state", HIDDEN, [(hidden, stored["out.last_hidden_state"])])
    yield close(f"{name}.logits", HIDDEN, [(logits, stored["out.logits"])])
    ce = F.cross_entropy(logits, batch.labels, reduction="none")
    yield close(f"{name}.ce", LOSS, [(ce, stored["out.ce"])])
    weights = torch.ones_like(ce) if facts["loss_def"] == "ce.mean()" else batch.loss_weights
    loss = (ce * weights).sum() / weights.sum()
    yield close(f"{name}.loss", LOSS, [(loss, facts["loss"])])
    loss.backward()
    full = {k.removeprefix("grad."): v for k, v in stored.items() if k.startswith("grad.")}
    yield from gradient_results(name, model, facts["grad_norms"], full)


def read_segments(
    golden: Golden, stored: dict[str, Tensor], sample_lens: list[int], prefix: str = "in."
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
    ends = torch.tensor(sample_lens).cumsum(0).tolist()
    samples: list[list[Segment]] = [[] for _ in ends]
    at = 0
    while at < len(ids):
        sample = next(i for i, end in enumerate(ends) if places[at] < end)
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
    """Index tensors and masks exactly, loss weights and pixels closely."""
    side = golden.config["vit"]["image_size"] // golden.config["vit"]["patch_size"]
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


# ---- c: both experts of the decoder ------------------------------------------------------------


@check("c_decoder_single", "c_train_gen_single.safetensors", "c_train_gen_single.json", *MODEL)
def decoder_single(golden: Golden) -> Iterator[Result]:
    yield from _decoder(golden, "c_train_gen_single", "c_decoder_single")


@check("c_decoder_multi", "c_train_gen_multi.safetensors", "c_train_gen_multi.json", *MODEL)
def decoder_multi(golden: Golden) -> Iterator[Result]:
    yield from _decoder(golden, "c_train_gen_multi", "c_decoder_multi")


@torch.no_grad()
def _decoder(golden: Golden, name: str, label: str) -> Iterator[Result]:
    """Stored embeddings through both experts: routing, norms, masks with noise splits, logits."""
    stored, facts = golden.tensors(name), golden.json(name)
    model = golden.model()
    samples = [
        tuple(Split(length, mode) for length, mode in zip(lengths, modes, strict=True))
        for lengths, modes in zip(
            facts["split_lens_from_mask"], facts["attn_modes_from_mask"], strict=True
        )
    ]
    masks = [(split_mask(splits), stored[f"in.mask{i}"]) for i, splits in enumerate(samples)]
    yield exact(f"{label}.masks", masks)
    embeddings, latent = stored["out.lm_input"], stored["in.packed_vae_token_indexes"]
    is_latent = torch.zeros(len(embeddings), dtype=torch.bool)
    is_latent[latent] = True
    route = Route((~is_latent).nonzero().flatten(), latent)
    layers = collect_layers(model)
    decoder = model.language_model.model
    plan = packed_plan(samples, "cpu")
    hidden = decoder(embeddings, stored["in.packed_position_ids"], plan, route)
    if "out.layer0" in stored:
        yield close(f"{label}.layers", HIDDEN, layer_pairs(layers, stored))
    yield close(f"{label}.last_hidden_state", HIDDEN, [(hidden, stored["out.last_hidden_state"])])
    logits = model.language_model.lm_head(hidden[stored["in.ce_loss_indexes"]])
    ce = F.cross_entropy(logits, stored["in.packed_label_ids"], reduction="none")
    yield close(f"{label}.logits", HIDDEN, [(logits, stored["out.logits"])])
    yield close(f"{label}.ce", LOSS, [(ce, stored["out.ce"])])


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


# ---- e: cached prefill, up to the first VAE image ----------------------------------------------


@check("e_prefill", "e_kvcache.safetensors", "e_kvcache.json", *MODEL)
def prefill(golden: Golden) -> Iterator[Result]:
    facts = golden.json("e_kvcache")
    stages = [(stage["tag"], stage["kv_lens"], stage["ropes"]) for stage in facts["stages"]]
    yield from _prefill(golden, "e_kvcache", "e_prefill", stages)


@check("e2_prefill", "e2_kvcache_batch2.safetensors", "e2_kvcache_batch2.json", *MODEL)
def prefill_batch(golden: Golden) -> Iterator[Result]:
    facts = golden.json("e2_kvcache_batch2")
    stages = [
        (f"s{i}_{kind}", lens, ropes) for i, (kind, lens, ropes) in enumerate(facts["stages"])
    ]
    yield from _prefill(golden, "e2_kvcache_batch2", "e2_prefill", stages)


@torch.no_grad()
def _prefill(
    golden: Golden, file: str, name: str, stages: list[tuple[str, list[int], list[int]]]
) -> Iterator[Result]:
    """Stage after stage into one ragged cache: lengths, positions, keys and values."""
    stored, model = golden.tensors(file), golden.model()
    rows = len(stages[0][1])
    cache = KVCache(model.config.llm, rows, max(max(lens) for _, lens, _ in stages))
    counts, tensors = [], []
    for tag, lens, ropes in stages:
        if tag.endswith("vae"):
            break
        batch = pack(_stage(golden, stored, tag, rows), golden.tokens)
        spans = torch.tensor(batch.sample_lens)
        offsets = torch.repeat_interleave(cache.positions, spans)
        batch = dataclasses.replace(batch, position_ids=batch.position_ids + offsets)
        model(batch, kv_cache=cache)
        following = cache.positions + torch.tensor(batch.next_positions)
        cache.advance(spans, following, int(spans.max()))
        counts += [(cache.lengths, torch.tensor(lens)), (cache.positions, torch.tensor(ropes))]
        for layer in range(len(cache.keys)):
            for kind, whole in (("key", cache.keys), ("value", cache.values)):
                if (expected := stored.get(f"{tag}.{kind}{layer}")) is not None:
                    parts = [whole[layer, r, :, :n].transpose(0, 1) for r, n in enumerate(lens)]
                    tensors.append((torch.cat(parts), expected))
    yield exact(f"{name}.lengths_and_positions", counts)
    yield close(f"{name}.keys_and_values", CACHE, tensors)


def _stage(golden: Golden, stored: dict[str, Tensor], tag: str, rows: int) -> list[list[Segment]]:
    """One block per row."""
    if tag.endswith("text"):
        lengths = stored[f"{tag}.in.text_token_lens"].tolist()
        blocks = stored[f"{tag}.in.packed_text_ids"].split(lengths)
        return [[Text(tuple(block[1:-1].tolist()))] for block in blocks]
    side = golden.config["vit"]["image_size"] // golden.config["vit"]["patch_size"]
    lengths = stored[f"{tag}.in.vit_token_seqlens"].tolist()
    patches = stored[f"{tag}.in.packed_vit_tokens"].split(lengths)
    positions = stored[f"{tag}.in.packed_vit_position_ids"].split(lengths)
    assert len(patches) == rows
    heights = [int(ids.max()) // side + 1 for ids in positions]
    return [[Image(x, h, len(x) // h)] for x, h in zip(patches, heights, strict=True)]
