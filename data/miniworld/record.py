"""One miniature item, and how cells of the 4x4 grid are named."""

from dataclasses import dataclass

from PIL import Image

GRID = 4
CELLS = tuple((row, column) for row in range(GRID) for column in range(GRID))


@dataclass(frozen=True)
class MiniRecord:
    """One item of a task family; both pictures are 56x56 RGB.

    `thoughts` are the texts before and after the visual thought of the interleaved teacher,
    `full_text_only_thought` is what the student says in their place.
    """

    task: str
    question: str
    answer: str
    problem_image: Image.Image
    visual_thought: Image.Image
    thoughts: tuple[str, str]
    full_text_only_thought: str

    @property
    def completion(self) -> str:
        """The text-only reference completion."""
        return f"<think>{self.full_text_only_thought}</think><answer>{self.answer}</answer>"


def column_name(column: int) -> str:
    """Columns are a..d from the left."""
    return "abcd"[column]


def cell_name(row: int, column: int) -> str:
    """Column letter, then row number counted from the top: 'b3'."""
    return f"{column_name(column)}{row + 1}"
