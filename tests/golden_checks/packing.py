"""l: packs of SFT rows (places, positions, labels, weights, splits), and pictures left out."""

import json
import re
from collections.abc import Iterator

import PIL.Image
import torch
from torch import Tensor

from data.transforms import ImageTransform
from modeling.sequence import Gap, Image, Latent, Segment, Split, Text, pack, segment_length
from modeling.tokenizer import SpecialTokens
from tests.golden_checks.core import Golden, Result, check, exact
from tests.golden_checks.decoder import compare_pack
from tests.tiny_model import FakeTokenizer

TOKEN_NAMES = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")


@check("l_sft_packing", "l_sft_packing.json", "l_sft_packing.safetensors")
def sft_packing(golden: Golden) -> Iterator[Result]:
    """Every stored pack from its rows, in its order; which rows go together is given."""
    stored, facts = golden.tensors("l_sft_packing"), golden.json("l_sft_packing")
    rows = _rows(facts, stored)
    yield from _given_samples(facts, rows["groupA"])
    packer, tokens = facts["packer"], _tokens(facts)
    for kind in ("dense", "flex"):
        lengths, splits = [], []
        for number, given in enumerate(facts[f"batches_{kind}"]):
            name = f"{kind}{number}"
            samples = [rows[i["dataset_name"]][i["data_indexes"]] for i in given["data_indexes"]]
            batch = pack(samples, tokens)
            lengths.append((batch.sample_lens, _unpadded(given, "sample_lens", batch.samples)))
            lengths.append((len(batch), given["sequence_length"]))
            if given["split_lens"] is not None:
                splits += _split_pairs(given, batch.samples)
            if f"{name}.packed_text_ids" in stored:
                side = packer["max_num_patch_per_side"]
                yield from compare_pack(f"l_{name}", batch, stored, f"{name}.", side)
        yield exact(f"l_{kind}.lengths", lengths)
        if splits:
            yield exact(f"l_{kind}.splits", splits)


@check("l_cond_dropout", "l_cond_dropout.json", "l_sft_packing.json")
def left_out(golden: Golden) -> Iterator[Result]:
    """Items that guidance training leaves out: of a picture its position stays, of a text nothing.

    The content of the kept text is stored only as part of the pack, and that of the picture by its
    length, so these are taken from there.
    """
    facts, tokens = golden.json("l_cond_dropout"), _tokens(golden.json("l_sft_packing"))
    ids = facts["packed_text_ids"]
    content = tuple(ids[1 : ids.index(tokens.eos)])
    latent = torch.zeros(facts["split_lens"][-1] - 2, 1)
    segments: list[Segment] = []
    for item in facts["plan"]:
        if item["enable_cfg"]:
            segments += [] if item["type"] == "text" else [Gap()]
        elif item["type"] == "text":
            segments.append(Text(content, bool(item["loss"])))
        else:
            target = latent if item["loss"] else None
            segments.append(Latent(latent, 1, len(latent), target=target))
    batch = pack([segments], tokens)
    pairs = [
        (batch.sample_lens, facts["sample_lens"]),
        (batch.position_ids, facts["packed_position_ids"]),
        (batch.token_ids, ids),
        (batch.token_index, facts["packed_text_indexes"]),
    ]
    yield exact("l_cond_dropout.pack", pairs)
    yield exact("l_cond_dropout.splits", _split_pairs(facts, batch.samples))


def _tokens(facts: dict) -> SpecialTokens:
    ids = facts["packer"]["tokens"]
    return SpecialTokens(*(ids[name] for name in TOKEN_NAMES))


def _unpadded(given: dict, key: str, samples: tuple[tuple[Split, ...], ...]) -> list:
    """Stored lengths or modes without what FlexAttention is padded with: one more sample."""
    values = given[key]
    padded = len(given["sample_lens"]) == len(samples) + 1
    return values[:-1] if padded else values


def _split_pairs(given: dict, samples: tuple[tuple[Split, ...], ...]) -> list[tuple]:
    """Lengths and modes of all splits; modes as numbers, which is what can be compared."""
    splits = [split for sample in samples for split in sample]
    modes = ("causal", "full", "noise")
    return [
        ([split.length for split in splits], _unpadded(given, "split_lens", samples)),
        (
            [modes.index(split.mode) for split in splits],
            [modes.index(mode) for mode in _unpadded(given, "attn_modes", samples)],
        ),
    ]


# ---- rows -------------------------------------------------------------------------------------


def _rows(facts: dict, stored: dict[str, Tensor]) -> dict[str, list[list[Segment]]]:
    """Per group its rows as segments, in the order in which the packer numbers them."""
    groups = {}
    for name, lines in (("groupA", facts["jsonl"]["a"]), ("groupB", facts["jsonl"]["b"])):
        by_id = {row["id"]: row for row in map(json.loads, lines)}
        order = facts["epoch_order_seed42"][name]
        groups[name] = [_segments(by_id[number], facts, stored) for number in order]
    return groups


def _segments(row: dict, facts: dict, stored: dict[str, Tensor]) -> list[Segment]:
    """Turns of a conversation: `<image>` stands for the next picture, answers carry the loss."""
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names
    pictures = iter(names)
    segments: list[Segment] = []
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            segments.append(Text(tuple(FakeTokenizer().encode(turn["value"])), loss=True))
            continue
        for part in re.split("(<image>)", turn["value"]):
            if part == "<image>":
                pixels = stored[f"image.{next(pictures)}"]
                segments.append(_image(pixels, len(names), facts["transform"]))
            elif part.strip():
                segments.append(Text(tuple(FakeTokenizer().encode(part.strip()))))
    return segments


def _image(pixels: Tensor, count: int, limits: dict) -> Image:
    """`count` pictures of a row share the limit on pixels."""
    transform, picture = ImageTransform(**limits), PIL.Image.fromarray(pixels.numpy())
    size = transform.size(*picture.size, img_num=count)
    return transform.segment(picture.resize(size, PIL.Image.Resampling.BICUBIC))


def _given_samples(facts: dict, rows: list[list[Segment]]) -> Iterator[Result]:
    """The rows of the first group are stored as samples too: ids, losses, picture sizes."""
    pairs, stride = [], facts["transform"]["image_stride"]
    for given, segments in zip(facts["samples_groupA"], rows, strict=True):
        texts = [segment for segment in segments if isinstance(segment, Text)]
        images = [segment for segment in segments if isinstance(segment, Image)]
        plan = given["sequence_plan"]
        kinds = [item["type"] == "text" for item in plan]
        pairs.append(([isinstance(segment, Text) for segment in segments], kinds))
        losses = [item["loss"] for item in plan if item["type"] == "text"]
        pairs.append(([int(text.loss) for text in texts], losses))
        ids = given["text_ids_list"]
        pairs.append(([len(text.token_ids) for text in texts], list(map(len, ids))))
        pairs.append(([i for text in texts for i in text.token_ids], sum(ids, [])))
        sides = [[3, image.height * stride, image.width * stride] for image in images]
        pairs.append((sides, given["image_shapes"]))
        # the stored count leaves out the two framing tokens of each block
        length = sum(map(segment_length, segments))
        pairs.append((length - 2 * len(segments), given["num_tokens"]))
    yield exact("l_samples", pairs)
