"""Cases: questions that one of two systems got wrong and the other right, as they were answered."""

import io
from collections.abc import Sequence

import PIL.Image

from eval.artefacts.model import Block, Picture, Source, Text
from eval.artefacts.results import Record, source_of
from eval.artefacts.runs import Runs, titled

FILE = "cases/cases.json"
SIDE, GAP = 224, 12  # pixels of a picture, and between two


def cases(runs: Runs) -> list[Block]:
    """Per case a strip of pictures and what both systems wrote."""
    records = runs.found(lambda: runs.results.records(FILE))
    if records == []:
        return [Text("No case", ("the two systems were right and wrong on the same questions",))]
    blocks: list[Block] = []
    for number, record in enumerate(records or [], 1):
        sources = (source_of(FILE, record),)
        strip = _strip(runs, record, number, sources)
        blocks += [] if strip is None else [strip]
        blocks.append(Text(_title(record), tuple(_lines(record)), sources))
    return blocks


def _title(record: Record) -> str:
    first, second = (answer["system"] for answer in record["values"]["answers"])
    right = first if record["values"]["case"] == "only_first" else second
    return f"{titled(record['task'])}, {record['id']}: only {right} is right"


def _lines(record: Record) -> list[str]:
    values = record["values"]
    lines = [
        f"case {values['place']} of {values['total']} of this kind; {values['rule']}",
        f"question: {values['question']}",
        f"gold: {values['gold']}",
    ]
    for answer in values["answers"]:
        verdict = "right" if answer["correct"] else "wrong"
        lines.append(f"{answer['system']} ({verdict}): {answer['text']}")
        if answer["redraw_error"]:
            lines.append(f"  its pictures could not be drawn again: {answer['redraw_error']}")
    return lines


def _strip(runs: Runs, record: Record, number: int, sources: tuple[Source, ...]) -> Picture | None:
    """Problem, what was drawn, and the data set's visual thoughts, side by side."""
    values = record["values"]
    drawn = [file for answer in values["answers"] for file in answer["pictures"]]
    files = {"problem": values["problem"], "drawn": drawn, "true": values["visual_thoughts"]}
    parts = {name: _pictures(runs, group) for name, group in files.items()}
    shown = [picture for group in parts.values() for picture in group]
    if not shown:
        return None
    strip = PIL.Image.new("RGB", (len(shown) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, picture in enumerate(shown):
        strip.paste(picture, (place * (SIDE + GAP), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    told = ", ".join(f"{len(group)} {name}" for name, group in parts.items() if group)
    title = f"{titled(record['task'])}, {record['id']}: from left to right {told}"
    return Picture(f"case_{number}", title, title, buffer.getvalue(), sources)


def _pictures(runs: Runs, files: Sequence[str]) -> list[PIL.Image.Image]:
    """Those that are there."""
    found = [runs.found(lambda f=file: runs.results.content(f"cases/{f}")) for file in files]
    return [_fitted(content) for content in found if content is not None]


def _fitted(content: bytes) -> PIL.Image.Image:
    """A picture in a square of SIDE pixels, on white; small ones keep their pixels visible."""
    with PIL.Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    sharp = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
    square = PIL.Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(picture.resize(size, sharp), (0, 0))
    return square
