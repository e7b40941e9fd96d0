"""m and the manifest: special-token ids, and every key and shape at full size."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from modeling.pretrained import RECOMPUTED
from modeling.tokenizer import Tokenizer as BagelTokenizer
from tests.golden_checks.core import Absent, Golden, Result, check, exact

BASE_VOCABULARY = 151_643  # ordinary entries of Qwen2.5; added tokens follow
FULL_SIZE = BagelConfig(
    llm=LLMConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    vit=ViTConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
    ),
)


@check("m_special_tokens", "m_special_tokens.json")
def special_tokens(golden: Golden) -> Iterator[Result]:
    facts = golden.json("m_special_tokens")
    order = sorted(facts["convention"], key=facts["convention"].get)
    counts, ids = [], []
    for case in facts.values():
        if not (isinstance(case, dict) and "len_before" in case):
            continue
        names = order[: case["len_before"] - BASE_VOCABULARY]
        backend = qwen_like_tokenizer(names, case["special_tokens_map"])
        counts.append((len(backend), case["len_before"]))
        tokenizer = BagelTokenizer(backend)
        counts.append((tokenizer.vocab_size, case["len_after"]))
        counts.append((tokenizer.num_added, case["num_new_tokens"]))
        special, stored = tokenizer.special, case["new_token_ids"]
        for ours, key in (
            (special.bos, "bos_token_id"),
            (special.eos, "eos_token_id"),
            (special.image_start, "start_of_image"),
            (special.image_end, "end_of_image"),
        ):
            ids.append((ours, stored[key]))
        ids += [(backend.convert_tokens_to_ids(n), facts["convention"][n]) for n in names]
        # encoding frames nothing, and literal markers are ordinary text
        ids.append((tokenizer.encode("hi"), backend.convert_tokens_to_ids(["h", "i"])))
        marker = tokenizer.encode("<image_start>")
        ids.append((len(marker), len("<image_start>")))
        ids.append((tokenizer.decode(marker) == "<image_start>", True))
    yield exact("m_special_tokens.counts", counts)
    yield exact("m_special_tokens.ids", ids)


def qwen_like_tokenizer(added: list[str], special_map: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Qwen2.5's layout: a byte vocabulary padded to full length, then the added tokens in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<filler_{i}>" for i in range(BASE_VOCABULARY - len(alphabet))]
    vocabulary = {token: i for i, token in enumerate(alphabet + filler)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    plain = ("<tool_call>", "</tool_call>", "<|fim_", "<|repo_name|>", "<|file_sep|>")
    backend.add_tokens(
        [AddedToken(t, special=not t.startswith(plain), normalized=False) for t in added]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_map)


@check("manifest", "bagel7b_manifest.json")
def manifest(golden: Golden) -> Iterator[Result | Absent]:
    facts = golden.json("bagel7b_manifest")
    stored = {key: tuple(entry["shape"]) for key, entry in facts["bagel"].items()}
    with torch.device("meta"):
        model, text_only = Bagel(FULL_SIZE, visual_gen=True), Bagel(FULL_SIZE)
        no_expert = Bagel(FULL_SIZE, generation_expert=False)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    yield exact("manifest.keys", [(len(shapes.keys() ^ stored.keys()), 0)])
    differing = [key for key in shapes.keys() & stored.keys() if shapes[key] != stored[key]]
    yield exact("manifest.shapes", [(len(differing), 0)])

    absent = set(facts["keys_absent_when_visual_gen_false"])
    without = stored.keys() - absent
    understanding = {key for key in without if "moe_gen" not in key}
    yield exact(
        "manifest.keys_without_visual_gen",
        [
            (len(text_only.state_dict().keys() ^ without), 0),
            (len(no_expert.state_dict().keys() ^ understanding), 0),
        ],
    )
    yield exact("manifest.parameter_counts", _counts(facts, shapes))
    constants = set(shapes) - {name for name, _ in model.named_parameters()}
    differing = constants ^ set(facts["non_trainable"]) | constants ^ set(RECOMPUTED)
    yield exact("manifest.non_trainable", [(len(differing), 0)])
    if "ae" in facts:
        with torch.device("meta"):
            state = AutoEncoder(VAEConfig()).state_dict()
        pairs = [(len(state.keys() ^ facts["ae"].keys()), 0)]
        pairs += [
            (tuple(state[key].shape), tuple(entry["shape"])) for key, entry in facts["ae"].items()
        ]
        yield exact("manifest.ae", pairs)


def _counts(facts: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Parameters per group, summed over our own shapes, and in all."""
    sums: Counter[str] = Counter()
    for key, shape in shapes.items():
        sums[facts["bagel"].get(key, {}).get("group", "?")] += math.prod(shape)
    pairs = [(sums[group], n) for group, n in facts["param_counts"].items() if group != "vae"]
    totals = facts["totals"]
    trainable = sum(sums.values()) - sums["fixed_pos_embed"]
    return [
        *pairs,
        (sum(sums.values()), totals["bagel_total"]),
        (trainable, totals["bagel_trainable"]),
        (len(shapes), totals["n_keys"]),
    ]
