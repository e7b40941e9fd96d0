"""e, f: cached prefill with pictures, greedy decoding, image generation, the inferencer."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from data.prompts import PAPER
from data.transforms import ImageTransform
from inferencer import InterleaveInferencer, _Row
from modeling.bagel import Bagel, text_logits
from modeling.drawing import DrawingParams, decode, draw, encode, latent_segment
from modeling.flow import Guidance
from modeling.generation import Rollout, Round, SamplingParams, extend
from modeling.kv_cache import KVCache
from modeling.layers import patchify, unpatchify
from modeling.sequence import Image, Segment, Text, decode_batch, pack
from tests.golden_checks.core import (
    CACHE,
    LATENT,
    VAE,
    Golden,
    Result,
    check,
    close,
    exact,
)
from tests.tiny_model import FakeTokenizer

MODEL = ("model.safetensors", "config.json", "ae.safetensors")
STEP = 5e-5  # logits of cached decoding
PIXELS = 5e-4  # decoded pictures


# ---- e: a context of text and pictures, stage after stage, then greedy decoding ----------------


@check("e_kvcache", "e_kvcache.safetensors", "e_kvcache.json", *MODEL)
def cached(golden: Golden) -> Iterator[Result]:
    facts = golden.json("e_kvcache")
    stages = [(stage["tag"], stage["kv_lens"], stage["ropes"]) for stage in facts["stages"]]
    yield from _cached(golden, "e_kvcache", stages, facts)


@check("e2_kvcache_batch2", "e2_kvcache_batch2.safetensors", "e2_kvcache_batch2.json", *MODEL)
def cached_batch(golden: Golden) -> Iterator[Result]:
    facts = golden.json("e2_kvcache_batch2")
    stages = [
        (f"s{i}_{kind}", lens, ropes) for i, (kind, lens, ropes) in enumerate(facts["stages"])
    ]
    yield from _cached(golden, "e2_kvcache_batch2", stages, facts)


@torch.no_grad()
def _cached(
    golden: Golden, name: str, stages: list[tuple[str, list[int], list[int]]], facts: dict
) -> Iterator[Result]:
    """Stage after stage into one ragged cache, then the stored number of greedy steps."""
    stored, model = golden.tensors(name), golden.model(visual_gen=True)
    rows = len(stages[0][1])
    tokens = stored["gen.tokens"].reshape(-1, rows)
    cache = KVCache(model.config.llm, rows, sum(max(lens) for _, lens, _ in stages) + len(tokens))
    contexts: list[list[Segment]] = [[] for _ in range(rows)]
    counts, tensors, latents = [], [], []
    for tag, lens, ropes in stages:
        blocks = _stage(golden, stored, tag, facts)
        extend(model, cache, blocks, golden.tokens)
        for context, block in zip(contexts, blocks, strict=True):
            context += block
        counts += [(cache.lengths, torch.tensor(lens)), (cache.positions, torch.tensor(ropes))]
        tensors += _stored_pairs(cache, stored, tag, lens)
        if f"{tag}.latent" in stored:
            latents.append((_grids(golden, stored, tag), stored[f"{tag}.latent"]))
    yield exact(f"{name}.lengths_and_positions", counts)
    yield close(f"{name}.keys_and_values", CACHE, tensors)
    if latents:
        yield close(f"{name}.latents", VAE, latents)

    logits = []
    for fed in tokens:
        logits.append(model(decode_batch(fed, cache.positions), cache, text_logits))
        one = torch.ones(rows, dtype=torch.long)
        cache.advance(one, cache.positions + 1, 1)
    steps = torch.stack(logits)  # (steps, B, V)
    yield close(f"{name}.step_logits", STEP, [(steps, stored["gen.step_logits"].view_as(steps))])
    yield exact(f"{name}.tokens", [(steps[:-1].argmax(-1), tokens[1:])])
    lens = [n + len(tokens) for n in stages[-1][1]]
    if "gen.key0" in stored:
        yield close(f"{name}.decoded_keys", CACHE, _stored_pairs(cache, stored, "gen", lens))
    if "train.logits" in stored:
        written = Text(tuple(tokens[1:, 0].tolist()), loss=True)
        batch = pack([[*contexts[0], written]], golden.tokens)
        packed = model(batch, head=text_logits)
        yield close(f"{name}.train_logits", STEP, [(packed, stored["train.logits"])])


def _stored_pairs(
    cache: KVCache, stored: dict[str, Tensor], tag: str, lens: list[int]
) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in range(len(cache.keys)):
        for kind, whole in (("key", cache.keys), ("value", cache.values)):
            if (expected := stored.get(f"{tag}.{kind}{layer}")) is not None:
                parts = [whole[layer, r, :, :n].transpose(0, 1) for r, n in enumerate(lens)]
                pairs.append((torch.cat(parts), expected))
    return pairs


def _grids(golden: Golden, stored: dict[str, Tensor], tag: str) -> Tensor:
    """Latents of the stage's pictures, padded to one size as the stored ones are: the norms of the
    VAE run over the padding too. This project encodes each size by itself.
    """
    pixels, noise = stored[f"{tag}.in.padded_images"], stored[f"{tag}.vae_noise"]
    return encode(golden.autoencoder(), pixels, noise)


def _stage(golden: Golden, stored: dict[str, Tensor], tag: str, facts: dict) -> list[list[Segment]]:
    """One block per row."""
    if tag.endswith("text"):
        lengths = stored[f"{tag}.in.text_token_lens"].tolist()
        blocks = stored[f"{tag}.in.packed_text_ids"].split(lengths)
        return [[Text(tuple(block[1:-1].tolist()))] for block in blocks]
    if tag.endswith("vae"):
        patch = golden.config["bagel"]["latent_patch_size"]
        shapes = facts[f"{tag}.in.patchified_vae_latent_shapes"]
        return [
            [latent_segment(grid[:, : h * patch, : w * patch], patch)]
            for grid, (h, w) in zip(_grids(golden, stored, tag), shapes, strict=True)
        ]
    side = golden.config["vit"]["image_size"] // golden.config["vit"]["patch_size"]
    lengths = stored[f"{tag}.in.vit_token_seqlens"].tolist()
    patches = stored[f"{tag}.in.packed_vit_tokens"].split(lengths)
    positions = stored[f"{tag}.in.packed_vit_position_ids"].split(lengths)
    heights = [int(ids.max()) // side + 1 for ids in positions]
    return [[Image(x, h, len(x) // h)] for x, h in zip(patches, heights, strict=True)]


# ---- f: drawing under three contexts ------------------------------------------------------------


@check("f_imagegen", "f_imagegen.safetensors", "f_imagegen.json", *MODEL)
@torch.no_grad()
def imagegen(golden: Golden) -> Iterator[Result]:
    """Every stored case but the one with a cached-feature shortcut, which is out of scope."""
    stored, facts = golden.tensors("f_imagegen"), golden.json("f_imagegen")
    model = golden.model(visual_gen=True)
    names = ("gen", "cfg_text", "cfg_img")
    contexts = [_stored_context(model, stored, facts, f"ctx.{name}") for name in names]
    built = _contexts(golden, model, stored, facts)
    yield exact(
        "f_imagegen.lengths_and_positions",
        [(a.lengths, b.lengths) for a, b in zip(built, contexts, strict=True)]
        + [(a.positions, b.positions) for a, b in zip(built, contexts, strict=True)],
    )
    pairs = []
    for name, cache in zip(names, built, strict=True):
        pairs += _stored_pairs(cache, stored, f"ctx.{name}", cache.lengths.tolist())
    yield close("f_imagegen.contexts", CACHE, pairs)

    patch = golden.config["bagel"]["latent_patch_size"]
    height, width = (side // (2 * patch) for side in facts["image_shape"])
    noise = unpatchify(stored["latent.in.packed_init_noises"][None], height, width, patch)
    drawn, latents = {}, []
    for name, case in facts["cases"].items():
        if case.get("enable_taylorseer"):
            continue
        params = drawing_params(case)
        drawn[name] = draw(model, *built, noise, params, golden.tokens)
        latents.append((patchify(drawn[name][0], patch), stored[f"{name}.latent"]))
    yield close("f_imagegen.latents", LATENT, latents)
    final = drawn["t50_global_img1.5"]
    yield close("f_imagegen.grid", LATENT, [(final, stored["t50_global_img1.5.latent_grid"])])
    pixels = golden.autoencoder().decode(final)
    yield close("f_imagegen.pixels", PIXELS, [(pixels, stored["t50_global_img1.5.decoded"])])
    shown = decode(golden.autoencoder(), final)[0].permute(1, 2, 0)
    bytes_ = ((shown * 0.5 + 0.5) * 255).byte()
    expected = stored["t50_global_img1.5.uint8"]
    yield close("f_imagegen.uint8", 1.0, [(bytes_.int(), expected.int())])


def drawing_params(case: dict) -> DrawingParams:
    guidance = Guidance(
        case["cfg_text_scale"],
        case["cfg_img_scale"],
        tuple(case["cfg_interval"]),
        case["cfg_renorm_type"],
        case["cfg_renorm_min"],
    )
    return DrawingParams(case["num_timesteps"], case["timestep_shift"], guidance)


def _stored_context(model: Bagel, stored: dict, facts: dict, name: str) -> KVCache:
    """Lengths and positions as stored."""
    lens, ropes = facts[name]["kv_lens"], facts[name]["ropes"]
    cache = KVCache(model.config.llm, len(lens), max(lens))
    cache.advance(torch.tensor(lens), torch.tensor(ropes), max(lens))
    return cache


def _contexts(golden: Golden, model: Bagel, stored: dict, facts: dict) -> list[KVCache]:
    """The same three, from the texts and the image."""
    inputs = facts["inputs"]
    inferencer = StoredNoise(golden, model, {"vae": [stored["ctx_vae_noise"]]})
    image = PIL.Image.fromarray(stored["image"].numpy())
    row = _Row(0, 0, (0, 0), [], [])
    inferencer.processor = dataclasses.replace(
        inferencer.processor, prompts=dataclasses.replace(PAPER, system=inputs["system"])
    )
    contexts = inferencer._contexts([image, inputs["question"]], row, think=True)
    return [inferencer._open([context]) for context in contexts]


class StoredNoise(InterleaveInferencer):
    """The inferencer with the stored image limits, tokenizer and noise."""

    def __init__(self, golden: Golden, model: Bagel, noises: dict[str, list[Tensor]]) -> None:
        limits = (golden.config[name] for name in ("vae_tf", "vit_tf"))
        tokenizer = FakeTokenizer(golden.tokens)
        super().__init__(
            model, golden.autoencoder(), tokenizer, *(ImageTransform(**limit) for limit in limits)
        )
        self.noises = {purpose: iter(values) for purpose, values in noises.items()}

    def noise(self, shape: tuple[int, ...], seed: int, purpose: str, number: int) -> Tensor:
        return next(self.noises[purpose]).reshape(shape)


# ---- f2, f3: the inferencer from end to end ------------------------------------------------------


class Scripted(StoredNoise):
    """Texts are given; the contexts they are written in are kept."""

    def __init__(self, golden: Golden, model: Bagel, noises: dict, texts: list[str]) -> None:
        super().__init__(golden, model, noises)
        self.texts, self.seen = iter(texts), []

    def write_round(self, cache, params, seeds, step=lambda: None) -> list[Rollout]:
        self.seen.append((cache.lengths.tolist(), cache.positions.tolist()))
        ids = tuple(self.processor.tokenizer.encode(next(self.texts)))
        return [Rollout((Round(ids, "eos", ()),))]


@check(
    "f2_interleave_inferencer",
    "f2_interleave_inferencer.safetensors",
    "f2_interleave_inferencer.json",
    *MODEL,
)
def interleaved(golden: Golden) -> Iterator[Result]:
    """Think, draw, think with texts given: contexts, and the picture that comes out."""
    name = "f2_interleave_inferencer"
    stored, facts, model = golden.tensors(name), golden.json(name), golden.model(visual_gen=True)
    call = facts["gen_image_calls"][0]
    height, width = call["shape"]
    patch = golden.config["bagel"]["latent_patch_size"]
    factor = 2 ** (len(golden.config["vae"]["ch_mult"]) - 1) * patch
    start = unpatchify(stored["init_noise"][None], height // factor, width // factor, patch)
    noises = {"vae": [stored["vae_noise0"], stored["vae_noise1"]], "draw": [start]}
    inferencer = Scripted(golden, model, noises, facts["scripted_texts"])
    image = PIL.Image.fromarray(stored["source_image"].numpy())
    options = {key: value for key, value in call["kw"].items() if key != "num_timesteps"}
    steps = call["kw"]["num_timesteps"]
    pieces = inferencer(
        image, facts["question"], think=True, num_timesteps=steps, retokenise=True, **options
    )
    kinds = ["str" if isinstance(piece, str) else "Image" for piece in pieces]
    yield exact(f"{name}.outputs", [(kinds == facts["output_types"], True)])
    places = [(entry["kv_lens"], entry["ropes"]) for entry in facts["gen_text_contexts"]]
    yield exact(f"{name}.contexts", [(inferencer.seen == places, True)])
    picture = torch.from_numpy(np.asarray(pieces[1]).copy()).int()
    yield close(f"{name}.picture", 1.0, [(picture, stored["out_image"].int())])


@check(
    "f3_understanding_inferencer",
    "f3_understanding_inferencer.json",
    "f2_interleave_inferencer.safetensors",
    *MODEL,
)
def understanding(golden: Golden) -> Iterator[Result]:
    """Greedy text after the image as the understanding encoder alone sees it."""
    name = "f3_understanding_inferencer"
    facts, model = golden.json(name), golden.model(visual_gen=True)
    inferencer = StoredNoise(golden, model, {})
    image = PIL.Image.fromarray(golden.tensors("f2_interleave_inferencer")["source_image"].numpy())
    context = inferencer._understanding([image, facts["question"]], think=True)
    params = SamplingParams(facts["max_think_token_n"] - 1, 0.0, 0)
    (completion,) = inferencer.complete([context], params)
    expected = facts["tokens"][0][1:]  # without the opening token
    yield exact(f"{name}.tokens", [(completion.rollout.token_ids, expected)])
    (text,) = inferencer(
        image,
        facts["question"],
        think=True,
        understanding_output=True,
        max_think_token_n=facts["max_think_token_n"],
        do_sample=facts["do_sample"],
    )
    yield exact(f"{name}.text", [(text == completion.text, True)])
