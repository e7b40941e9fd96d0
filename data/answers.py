"""Answer parsing and matching, shared by validation during training and by evaluation."""

import re

# "B", "(B)", "B.", "B)", "(b): a cat"; not "A cat", where the letter is an article.
_OPTION = re.compile(r"\(?([A-Za-z])(?:$|[).:]+(?:\s+(?P<text>\S.*))?$)", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, stripped; None when there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def normalise(answer: str) -> str:
    """Lower case, runs of white space as one space, no trailing periods."""
    return " ".join(answer.casefold().split()).rstrip(". ")


def option_letter(answer: str) -> str | None:
    """Upper-case letter of an answer that names a multiple-choice option, else None."""
    match = _OPTION.match(answer.strip())
    return match.group(1).upper() if match else None


def answers_match(pred: str, gold: str) -> bool:
    """Whether two answers are the same after normalisation, or name the same option.

    A bare letter matches that letter with its text ("B", "(B)", "B. a cat"). Two options with
    different texts do not match even under one letter. An empty prediction matches nothing.
    """
    if not normalise(pred):
        return False
    if normalise(pred) == normalise(gold):
        return True
    letters = option_letter(pred), option_letter(gold)
    if letters[0] is None or letters[0] != letters[1]:
        return False
    texts = [_OPTION.match(answer.strip()).group("text") for answer in (pred, gold)]
    return None in texts or normalise(texts[0]) == normalise(texts[1])
