"""The class of every token of a completion: the class of the text it stands in.

    tag          <think>, </answer>, <image_start>, ...
    answer       what stands between <answer> and </answer>
    number       a word with a digit
    function     a word of FUNCTION_WORDS, or a contraction of such words
    content      any other word
    other        punctuation and white space

The time is linear in the length of the completion, so it can be done for every one of a training
step. It asks for a byte-level tokenizer, where the text of a sequence is the text of its bytes.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from modeling.tokenizer import Tokenizer, TokenizerError

TokenClass = Literal["tag", "answer", "number", "function", "content", "other"]
CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
# Grammar only: words of place, direction, order and amount are what visual problems turn on. What
# negates belongs to it, as it does in the contractions, where it has no place of its own.
_GRAMMAR = """
    also am an and any are as at be because been being but by can cannot could did do does for from
    had has have he her here his how i if is it its just may might must my no nor not of or our
    shall she should since so some such than that the their them then there these they this those
    thus to was we were what when which while who whose why will with would yet you your
"""
_NEGATED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
    needn't shan't shouldn't wasn't weren't won't wouldn't let's
"""
FUNCTION_WORDS = frozenset((_GRAMMAR + _NEGATED).split())
ENDINGS = frozenset(["d", "ll", "m", "re", "s", "ve"])  # "it's", "they're"; not those of a noun
TAG = re.compile(r"</?\w+>")
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
WORD = re.compile(r"\w+(?:['’]\w+)*")
ARTICLE = re.compile(r"[aA]\s+[^\W\d_]{2,}")  # a single letter elsewhere is a label
TORN = "\ufffd"  # stands for bytes that are no character, or not yet
LONGEST_START = 3  # bytes of a character that is not complete


class TokenClassifier:
    """Classes of completions under one tokenizer, whose single tokens are decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # token -> its text on its own

    def __call__(self, token_ids: Sequence[int]) -> list[TokenClass]:
        """The class of each token.

        Raises:
            TokenizerError: the texts of the tokens do not add up to that of the completion.
        """
        text = self.tokenizer.decode(token_ids)
        by_character = character_classes(text)
        classes: list[TokenClass] = []
        start = 0
        for length in self._lengths(token_ids):
            # a token of white space and a word has the class of the word
            inside = (c for c in by_character[start : start + length] if c != "other")
            classes.append(next(inside, "other"))
            start += length
        if start != len(text):
            raise TokenizerError(
                f"the tokens of {text[:40]!r} have {start} characters on their own and {len(text)} "
                "together: classes of tokens need a byte-level tokenizer, like that of Qwen2.5"
            )
        return classes

    def _lengths(self, token_ids: Sequence[int]) -> list[int]:
        """By how many characters each token makes the text longer.

        A token of whole characters adds them, whatever stands before it. One with a part of a
        character is read after the parts before it; three of these are enough, since after three
        bytes no reader of UTF-8 remembers where it began.
        """
        lengths, parts = [], []
        for token in token_ids:
            if token not in self._texts:
                self._texts[token] = self.tokenizer.decode([token])
            alone = self._texts[token]
            if TORN not in alone:
                lengths.append(len(alone))
                parts = [] if alone else parts
                continue
            before = len(self.tokenizer.decode(parts))
            lengths.append(len(self.tokenizer.decode([*parts, token])) - before)
            parts = [*parts, token][-LONGEST_START:]
        return lengths


def classes_of(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[TokenClass]:
    """The class of every token of one completion; for many, keep a `TokenClassifier`."""
    return TokenClassifier(tokenizer)(token_ids)


def character_classes(text: str) -> list[TokenClass]:
    """The class of every character."""
    found: list[TokenClass] = ["other"] * len(text)

    def mark(span: tuple[int, int], name: TokenClass) -> None:
        found[span[0] : span[1]] = [name] * (span[1] - span[0])

    for word in WORD.finditer(text):
        name: TokenClass = "content"
        if any(sign.isdigit() for sign in word[0]):
            name = "number"
        elif word[0] in "aA":
            name = "function" if ARTICLE.match(text, word.start()) else "content"
        elif _is_function(word[0].casefold().replace("’", "'")):
            name = "function"
        mark(word.span(), name)
    for answer in ANSWER.finditer(text):
        mark(answer.span(1), "answer")
    for tag in TAG.finditer(text):
        mark(tag.span(), "tag")
    return found


def _is_function(word: str) -> bool:
    stem, _, ending = word.partition("'")
    return word in FUNCTION_WORDS or (stem in FUNCTION_WORDS and ending in ENDINGS)
