"""Tokenizer of a checkpoint folder and its named special-token ids.

`<think>`, `<answer>` and `<image_start>` are ordinary text of several tokens: they are looked for
in decoded strings, never by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class TokenizerError(ValueError):
    """Tokenizer files that cannot be read; shown without a traceback."""


@dataclass(frozen=True)
class SpecialTokens:
    """Framing tokens: text blocks are bos .. eos, image blocks are image_start .. image_end."""

    bos: int  # <|im_start|>
    eos: int  # <|im_end|>
    image_start: int  # <|vision_start|>
    image_end: int  # <|vision_end|>


SPECIAL_STRINGS = SpecialTokens("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")  # type: ignore[arg-type]


class Tokenizer:
    """Text <-> ids without automatic special tokens; framing belongs to the packer."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        self.backend = backend
        self.special, self.num_added = add_special_tokens(backend)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @property
    def vocab_size(self) -> int:
        """Ids in use, added tokens included (the embedding may be larger, never smaller)."""
        return len(self.backend)

    def save(self, path: str | Path) -> None:
        self.backend.save_pretrained(str(path))


def add_special_tokens(backend: PreTrainedTokenizerBase) -> tuple[SpecialTokens, int]:
    """Name the four framing tokens, adding those the vocabulary lacks.

    Returns the ids and how many tokens had to be added (0 for Qwen2.5 vocabularies).
    """
    names = (
        SPECIAL_STRINGS.bos,
        SPECIAL_STRINGS.eos,
        SPECIAL_STRINGS.image_start,
        SPECIAL_STRINGS.image_end,
    )
    vocabulary = backend.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    added = backend.add_tokens(missing, special_tokens=True) if missing else 0
    return SpecialTokens(*backend.convert_tokens_to_ids(list(names))), added


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open the tokenizer files of a checkpoint folder; never asks the network.

    Raises:
        FileNotFoundError: there are none.
        TokenizerError: they are damaged.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt"
        )
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:  # the backend raises bare Exception, KeyError, TypeError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TokenizerError(
            f"{folder}: the tokenizer cannot be read ({reason}); copy tokenizer.json and "
            "tokenizer_config.json from the original checkpoint again"
        ) from error
