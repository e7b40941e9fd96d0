"""Example: one record of the released parquet schema, decoded."""

import io
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image

from data.transforms import to_rgb

MAX_ROUNDS = 8
# The released files carry the first spelling, its documentation the second.
THOUGHT_COLUMNS = ("resoning_thought_{}", "reasoning_thought_{}")
IMAGE_COLUMN = "reasoning_image_{}"
PROBLEM_COLUMN = "problem_image_0"
# What Pillow raises on damaged bytes; anything else is a bug and travels on.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    PIL.Image.DecompressionBombError,
)


class DataError(ValueError):
    """The data set or its configuration is not usable as it stands."""


class ExampleError(DataError):
    """One row is not usable; a training mixture counts it and takes the next one."""


@dataclass(frozen=True)
class Fields:
    """What a use needs beyond question, answer and problem image.

    Only the columns of these fields are read from disk.
    """

    visual_thoughts: bool = True
    thoughts: bool = True
    full_text_only_thought: bool = True
    interleaved: bool = False  # also: a thought before each visual thought, one after the last
    max_rounds: int = MAX_ROUNDS  # visual thoughts 0 .. max_rounds - 1, thoughts one more

    def columns(self, available: Collection[str], file: str) -> tuple[str, ...]:
        """Columns to read from a file that has `available`.

        Raises:
            DataError: a required column is missing.
        """
        required = [PROBLEM_COLUMN, "question", "answer"]
        if self.full_text_only_thought:
            required.append("full_text_only_thought")
        optional = ["pid", "task"]
        rounds = range(self.max_rounds + 1)  # a thought follows the last visual thought
        if self.visual_thoughts:
            required.append(IMAGE_COLUMN.format(0))
            optional += [IMAGE_COLUMN.format(i) for i in rounds[1:-1]]
        if self.thoughts:
            optional += [name.format(i) for i in rounds for name in THOUGHT_COLUMNS]
        missing = [name for name in required if name not in available]
        if missing:
            raise DataError(
                f"{file}: missing column(s) {', '.join(missing)}; the file has "
                f"{', '.join(sorted(available))}. Rename or add the column (see docs/data.md)."
            )
        return tuple(name for name in (*required, *optional) if name in available)


ALL_FIELDS = Fields()


@dataclass(frozen=True)
class Example:
    """One question with its answer, its images decoded to RGB; fields not read are empty."""

    source: str
    pid: str
    task: str
    question: str
    answer: str
    problem_image: PIL.Image.Image
    visual_thoughts: tuple[PIL.Image.Image, ...] = ()
    thoughts: tuple[str, ...] = ()
    full_text_only_thought: str = ""
    skipped_vts: int = 0  # visual thoughts of the row that could not be decoded

    @property
    def key(self) -> str:
        return f"{self.source}/{self.pid}"


def decode_example(
    row: Mapping[str, Any],
    source: str,
    row_index: int,
    fields: Fields = ALL_FIELDS,
    file: str = "<row>",
) -> Example:
    """Decode one row.

    A missing `pid` becomes the row index, a missing `task` the source name. Absent visual thoughts
    are left out, damaged ones are left out and counted in `skipped_vts`.

    Args:
        row: column name -> value; images are {"bytes", "path"} as `datasets` writes them.
        row_index: place of the row in its source, for messages and for the fallback pid.

    Raises:
        DataError: a required column is missing.
        ExampleError: question, answer or problem image of this row are empty or damaged.
    """
    fields.columns(row, file)
    where = f"{file}, row {row_index} of {source}"
    visual_thoughts, skipped = _visual_thoughts(row, fields)
    return Example(
        source=source,
        pid=str(row_index if row.get("pid") is None else row["pid"]),
        task=str(row.get("task") or source),
        question=_text(row, "question", where),
        answer=_text(row, "answer", where),
        problem_image=_problem_image(row, where),
        visual_thoughts=visual_thoughts,
        thoughts=_thoughts(row, fields),
        full_text_only_thought=(
            row["full_text_only_thought"] or "" if fields.full_text_only_thought else ""
        ),
        skipped_vts=skipped,
    )


def check_complete(example: Example, fields: Fields, where: str) -> None:
    """Raise ExampleError if a requested field came out empty, since it cannot be trained on."""
    empty = None
    if fields.visual_thoughts and not example.visual_thoughts:
        empty = "reasoning_image_*"
    elif fields.interleaved and not _interleaved(example):
        raise ExampleError(
            f"{where}: {len(example.thoughts)} thoughts around {len(example.visual_thoughts)} "
            "visual thoughts; an interleaved row has a text before each image and one after the "
            "last: fill reasoning_thought_* or drop the row"
        )
    elif fields.full_text_only_thought and not example.full_text_only_thought.strip():
        empty = "full_text_only_thought"
    if empty:
        raise ExampleError(
            f"{where}: column {empty} is empty or damaged ({example.skipped_vts} damaged visual "
            "thoughts); fill it or drop the row"
        )


def _interleaved(example: Example) -> bool:
    return len(example.thoughts) == len(example.visual_thoughts) + 1


def decode_image(data: bytes) -> PIL.Image.Image:
    """Encoded bytes -> RGB image, fully loaded. Raises one of DECODE_ERRORS on damaged bytes."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(image)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if value is None or not str(value).strip():
        raise ExampleError(f"{where}: column {column} is empty; fill it or drop the row")
    return str(value)


def _problem_image(row: Mapping[str, Any], where: str) -> PIL.Image.Image:
    data = (row[PROBLEM_COLUMN] or {}).get("bytes")
    if not data:
        raise ExampleError(
            f"{where}: column {PROBLEM_COLUMN} holds no image bytes; embed the image in the file "
            "(paths are not followed) or drop the row"
        )
    try:
        return decode_image(data)
    except DECODE_ERRORS as error:
        raise ExampleError(
            f"{where}: column {PROBLEM_COLUMN} is not a readable image ({error}); "
            "download the file again or drop the row"
        ) from error


def _visual_thoughts(
    row: Mapping[str, Any], fields: Fields
) -> tuple[tuple[PIL.Image.Image, ...], int]:
    images, skipped = [], 0
    for i in range(fields.max_rounds if fields.visual_thoughts else 0):
        cell = row.get(IMAGE_COLUMN.format(i))
        if not cell or not (cell.get("bytes") or cell.get("path")):
            continue
        try:
            images.append(decode_image(cell["bytes"] or b""))
        except DECODE_ERRORS:
            skipped += 1
    return tuple(images), skipped


def _thoughts(row: Mapping[str, Any], fields: Fields) -> tuple[str, ...]:
    thoughts = []
    for i in range(fields.max_rounds + 1 if fields.thoughts else 0):
        spellings = [row.get(name.format(i)) for name in THOUGHT_COLUMNS]
        thoughts += [text for text in spellings if text][:1]
    return tuple(thoughts)
