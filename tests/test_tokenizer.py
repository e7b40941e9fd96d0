"""Tokenizer wrapper: named special ids, no automatic framing, save and load."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling.tokenizer import SpecialTokens, TokenizerError, load_tokenizer
from modeling.tokenizer import Tokenizer as BagelTokenizer

FRAMING = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


def backend(added):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_known_framing_tokens_are_named_not_added():
    tokenizer = BagelTokenizer(backend(FRAMING[::-1]))
    assert tokenizer.special == SpecialTokens(259, 258, 257, 256)
    assert tokenizer.num_added == 0 and tokenizer.vocab_size == 260


def test_missing_framing_tokens_are_added_at_the_end():
    tokenizer = BagelTokenizer(backend(FRAMING[:2]))
    assert tokenizer.special == SpecialTokens(256, 257, 258, 259)
    assert tokenizer.num_added == 2 and tokenizer.vocab_size == 260


@pytest.mark.parametrize("text", ["", "hi there", "  two  spaces, and a comma ,", "naïve\n日本"])
def test_encode_adds_nothing_and_decode_inverts_it(text):
    tokenizer = BagelTokenizer(backend(FRAMING))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and max(ids, default=0) < 256
    assert tokenizer.decode(ids) == text


def test_markers_in_text():
    tokenizer = BagelTokenizer(backend(FRAMING))
    assert len(tokenizer.encode("<image_start>")) == 13  # ordinary bytes
    assert tokenizer.decode([tokenizer.special.eos]) == "<|im_end|>"  # kept, not skipped


def test_save_and_load(tmp_path):
    tokenizer = BagelTokenizer(backend(FRAMING[:2]))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special == tokenizer.special and again.num_added == 0
    assert again.encode("same text") == tokenizer.encode("same text")


def test_a_folder_without_tokenizer_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer in {tmp_path}.*tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"[]", b'{"model": ', b"\xff\xfe\x00"])
def test_damaged_files_are_one_kind_of_error(tmp_path, name, text):
    BagelTokenizer(backend(FRAMING)).save(tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(TokenizerError, match=f"{tmp_path}: the tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
