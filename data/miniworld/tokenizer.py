"""A byte-level BPE tokenizer for the miniature world: every word and every tag is one token.

All 256 bytes are in the vocabulary, so any text encodes and decodes exactly. Tags such as <think>
are ordinary tokens, as in the released checkpoints; only framing and padding are special.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.miniworld.world import FAMILIES
from data.prompts import PROMPT_SETS

FRAMING_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL_TOKENS = ("<|endoftext|>", *FRAMING_TOKENS)
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<image_start>", "<image_end>")
MINI = PROMPT_SETS["mini"]
PROMPTS = (MINI.system, MINI.reference_intro, MINI.transition)
DIGITS = tuple("0123456789")

# A tag, a word or a run of other signs with at most one leading space, or other white space.
_PIECES = r"<[^<>\s]*>| ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}<>]+|\s+|[<>]"
_MORE_THAN_ENOUGH = 4096  # merging ends by itself once every piece of the sentences is one token


def build_tokenizer() -> Tokenizer:
    """Merge the world's own sentences until each word of them is one token (deterministic)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MORE_THAN_ENOUGH,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def save_tokenizer(folder: str | Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, loadable with transformers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(FRAMING_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer


def _sentences() -> list[str]:
    texts = [*TAGS, *PROMPTS, *DIGITS]
    for family in FAMILIES.values():
        texts += family.sentences()
    return texts
