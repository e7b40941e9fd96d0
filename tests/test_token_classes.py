"""KL by class of token: classes of characters and tokens, shares, the test, the command."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.processor import Processor
from data.token_classes import CLASSES, TokenClassifier, character_classes, classes_of
from eval import kl_diagnostic, token_classes
from eval.token_classes import Tokens, content_against_function, shares
from modeling.tokenizer import TokenizerError, load_tokenizer
from tests.data_helpers import ByteTokenizer
from tests.eval_helpers import flags, write_world
from train.config import UsageError
from train.records import read_records

TEXT = "<think>Is the left one a cat? A fits b3, and 12</think><answer>the A</answer>"


def words(text: str) -> dict[str, str]:
    """Each word, tag or sign of a text with the class of its first character."""
    found = character_classes(text)
    return {m[0]: found[m.start()] for m in re.finditer(r"</?\w+>|\w+|[^\w\s]", text)}


def test_characters_have_the_class_of_what_they_stand_in() -> None:
    assert words("<think>Is the left one a cat? A fits b3, and 12</think>") == {
        "<think>": "tag", "Is": "function", "the": "function", "left": "content",
        "one": "content", "a": "function", "cat": "content", "?": "other", "A": "function",
        "fits": "content", "b3": "number", ",": "other", "and": "function", "12": "number",
        "</think>": "tag",
    }  # fmt: skip
    assert words("bar a 4, piece A.")["a"] == words("bar a 4, piece A.")["A"] == "content"
    assert words("go up or down in 3") == {
        "go": "content", "up": "content", "or": "function", "down": "content", "in": "content",
        "3": "number",
    }  # fmt: skip
    inside = character_classes("<answer>the 4</answer> the")
    assert inside[8:13] == ["answer"] * 5 and inside[-3:] == ["function"] * 3
    assert character_classes("<answer>cut off")[8:] == ["answer"] * 7
    assert character_classes("") == []


def test_contractions_are_one_word() -> None:
    text = "Don't say it’s no cat's, I'm not, they'll see the A's 'left' side; "
    text += "he can’t fit O'Neil by'B"
    found = character_classes(text)
    classes = {m[0]: set(found[m.start() : m.end()]) for m in re.finditer(r"[^\s,;]+", text)}
    assert classes == {
        "Don't": {"function"}, "say": {"content"}, "it’s": {"function"}, "no": {"function"},
        "cat's": {"content"}, "I'm": {"function"}, "not": {"function"}, "they'll": {"function"},
        "see": {"content"}, "the": {"function"}, "A's": {"content"},
        "'left'": {"other", "content"}, "side": {"content"}, "he": {"function"},
        "can’t": {"function"}, "fit": {"content"}, "O'Neil": {"content"},
        "by'B": {"content"},
    }  # fmt: skip


def test_tokens_have_the_class_of_the_text_they_stand_in() -> None:
    tokenizer = ByteTokenizer()  # a token per byte
    assert classes_of(tokenizer.encode(TEXT), tokenizer) == character_classes(TEXT)
    mini = Processor.from_pretrained("models/mini-base").tokenizer
    ids = mini.encode(TEXT)
    found = classes_of(ids, mini)
    for token, name in zip(ids, found, strict=True):
        text = mini.decode([token])
        if text in ("<think>", "</think>", "<answer>", "</answer>"):
            assert name == "tag"
        elif text.strip() == "left":  # with the blank before it
            assert name == "content"
    assert set(found) >= {"tag", "content", "answer"}


class LossyBytes(ByteTokenizer):
    """A token per byte, and one of two bytes; bytes that are no text are shown as such."""

    def decode(self, token_ids: Sequence[int]) -> str:
        pieces = (
            b"" if i < 16 else b"\x98\x80" if i == 272 else bytes([i - 16]) for i in token_ids
        )
        return b"".join(pieces).decode(errors="replace")


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.tokens += len(token_ids)
        return self.tokenizer.decode(token_ids)


def classes_by_prefixes(token_ids: Sequence[int], tokenizer) -> list[str]:
    """The definition: a token stands where the text of the prefix that it ends grows."""
    by_character = character_classes(tokenizer.decode(token_ids))
    classes, start = [], 0
    for end in range(1, len(token_ids) + 1):
        reached = max(start, len(tokenizer.decode(token_ids[:end])))
        named = [c for c in by_character[start:reached] if c != "other"]
        classes.append(named[0] if named else "other")
        start = reached
    return classes


TEXTS = (
    TEXT,
    "",
    " ",
    "<answer>é 4</answer> naïve café, Größe 12 und 数字 ٣ <think>",
    "🙂🙃 the <answer>🙂</answer>\n\n 👩‍👩‍👧 a cat",
    "\ufffd the \ufffd\ufffd b3 \ufffd",
    "<answer>never closed the 4 é",
)


@pytest.mark.parametrize("text", TEXTS)
def test_classes_are_those_of_growing_prefixes(text: str) -> None:
    for tokenizer in (LossyBytes(), load_tokenizer("models/mini-base")):
        ids = tokenizer.encode(text)
        assert classes_of(ids, tokenizer) == classes_by_prefixes(ids, tokenizer)


@pytest.mark.parametrize("seed", range(3))
def test_torn_characters_have_the_classes_of_growing_prefixes(seed: int) -> None:
    """Characters split over tokens, cut short, without beginning, with empty tokens among them."""
    draw = random.Random(seed)
    starts = [*b"\xc3\xe2\xf0\xf4\xff\xed", *b"\x80\x98\x9f\xa9\xbf", *b"a 4<"]
    lossy, mini = LossyBytes(), load_tokenizer("models/mini-base")
    classes_in = {t: TokenClassifier(t) for t in (lossy, mini)}
    torn = [i for i in range(mini.vocab_size) if "\ufffd" in mini.decode([i])]
    assert len(torn) > 100
    for _ in range(150):
        ids = [draw.choice([0, 272, *(16 + byte for byte in starts)]) for _ in range(20)]
        assert classes_in[lossy](ids) == classes_by_prefixes(ids, lossy), ids
        ids = [draw.choice(torn if draw.random() < 0.7 else range(441)) for _ in range(12)]
        assert classes_in[mini](ids) == classes_by_prefixes(ids, mini), ids


def test_the_classes_take_linear_time() -> None:
    """Also of a completion of torn characters, such as a collapsed student may write."""
    for ids in (LossyBytes().encode(TEXT * 20), [16 + 0xF0] * 1500, [16 + 0x98] * 1500):
        tokenizer = Counting(LossyBytes())
        TokenClassifier(tokenizer)(ids)
        assert tokenizer.tokens <= 10 * len(ids)


def test_a_tokenizer_whose_tokens_do_not_add_up_is_refused() -> None:
    class Stripping(LossyBytes):
        def decode(self, token_ids: Sequence[int]) -> str:
            return super().decode(token_ids).strip()

    tokenizer = Stripping()
    with pytest.raises(TokenizerError, match="'a b' have 2 characters .* 3 together.*byte-level"):
        classes_of(tokenizer.encode("a b"), tokenizer)


def sample(content: list[float], function: list[float], task: str = "t") -> Tokens:
    rows = {name: [] for name in CLASSES} | {"content": content, "function": function}
    return Tokens(task, rows)


def test_shares_are_of_all_kl() -> None:
    found = shares([sample([1.0, 2.0], [1.0]), sample([3.0], [])])
    assert found == {
        "function": {"tokens": 1, "mean": 1.0, "share": 1 / 7},
        "content": {"tokens": 3, "mean": 2.0, "share": 6 / 7},
    }


def test_the_difference_is_that_of_means_per_sample() -> None:
    """A long sample counts no more than a short one, and one without both kinds not at all."""
    found = content_against_function(
        [sample([2.0] * 50, [1.0]), sample([5.0], [1.0, 3.0]), sample([9.0], [])], seed=0
    )
    assert found.n == 2 and found.value == pytest.approx((1 + 3) / 2)
    assert found.low == 1.0 and found.high == 3.0
    assert content_against_function([sample([1.0], [])], seed=0) is None


def test_the_permutation_test_has_its_closed_form() -> None:
    """Of n equal differences two of 2 ** n flips are as extreme; of opposite ones all are."""
    equal = content_against_function([sample([2.0], [1.0])] * 5, seed=0)
    assert equal.p == pytest.approx(2 / 2**5, abs=0.01)
    opposite = content_against_function([sample([2.0], [1.0]), sample([1.0], [2.0])], seed=0)
    assert opposite.value == 0.0 and opposite.p == 1.0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = write_world(tmp_path_factory.mktemp("world"))
    kl_diagnostic.main(flags(world, world / "kl", num_samples=8, batch_size=4))
    return world


def test_command_counts_every_token_of_the_diagnostic(measured: Path, capsys) -> None:
    for measure in ("pre", "shuffled_vt"):
        token_classes.main(
            [str(measured / "kl"), "--model_path", str(measured / "base"), "--measure", measure]
        )
        records = read_records(measured / "kl" / "tokens.json")
        samples = [
            r["values"]["kl_t"][measure] for r in read_records(measured / "kl" / "records.jsonl")
        ]
        tests = [r for r in records if r["id"] == token_classes.TEST]
        assert {r["task"] for r in tests} == {"Spatial_Navigation", "overall"}
        assert all(0 < r["values"]["p"] <= 1 and r["values"]["n"] for r in tests)
        overall = [r["values"] for r in records if r["task"] == "overall" and r not in tests]
        assert sum(row["tokens"] for row in overall) == sum(map(len, samples))
        assert sum(row["share"] for row in overall) == pytest.approx(1)
        total = sum(row["tokens"] * row["mean"] for row in overall)
        assert total == pytest.approx(sum(map(sum, samples)))
        assert {row["measure"] for row in overall} == {measure}
        assert f"Mean KL_t ({measure})" in (measured / "kl" / "tokens.md").read_text()
    assert "content" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--measure", "nothing"], "--measure nothing: "),
        (["--model_path", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(measured: Path, capsys, extra, words) -> None:
    arguments = [str(measured / "kl"), "--model_path", str(measured / "base"), *extra]
    with pytest.raises(SystemExit):
        token_classes.main(arguments)
    assert words in capsys.readouterr().err


def test_a_folder_without_a_diagnostic_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="records.jsonl is missing: run eval.kl_diagnostic"):
        token_classes.read_tokens(tmp_path, ByteTokenizer(), "pre")
