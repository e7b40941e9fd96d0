"""Answer extraction and matching: truth tables."""

import pytest

from data.answers import answers_match, extract_answer, normalise, option_letter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>not B</think><answer>A</answer>", "A"),
        ("<answer>A</answer> no, wait <answer> B\n</answer> done", "B"),
        ("<answer>A</answer> then cut off: <answer>B", "A"),
        ("write <answer> first: <answer>C</answer>", "C"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("the answer is B", None),
        ("</answer>B<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("C) a dog", "C"),
        ("(D): the sea", "D"),
        ("A cat", None),
        ("AB", None),
        ("12", None),
        ("", None),
    ],
)
def test_option_letter(answer, letter):
    assert option_letter(answer) == letter


@pytest.mark.parametrize(
    ("pred", "gold", "match"),
    [
        ("Left", "left", True),
        ("  go   left. ", "Go left", True),
        ("(B)", "B", True),
        ("B. a cat", "B", True),
        ("b", "B. a cat", True),
        ("B. a cat", "B. A cat.", True),
        ("B. a cat", "B. a dog", False),
        ("A cat", "A", False),
        ("A", "B", False),
        ("R,R,D", "R,D,R", False),
        ("3.5", "35", False),
        ("", "", False),
        (".", "", False),
    ],
)
def test_answers_match(pred, gold, match):
    assert answers_match(pred, gold) is match
    assert answers_match(gold, pred) is match


def test_normalise_is_idempotent():
    for text in ("  A  B.", "x. .", "Straße", ""):
        assert normalise(normalise(text)) == normalise(text)
    assert normalise("  The\tRed  Ball. ") == "the red ball"
