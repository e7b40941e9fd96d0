"""Artefacts written as files: report.md, report.html, tables/NAME.csv, figures/NAME.png.

The same artefacts give the same bytes. A table in CSV has one column per column of the table with
unrounded values, empty where nothing was run. Two columns follow: `paper_columns` names those whose
value in this row is the paper's own, `sources` the result files of the others.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval.artefacts.html import DENSITY, html_page
from eval.artefacts.markdown import markdown_page, visible
from eval.artefacts.model import Artefact, Cell, Number, Picture, Source, Table, joined
from train.config import UsageError
from train.records import write_atomic

MARKERS = ("paper_columns", "sources")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
CSS_DPI = 96  # pixels of a page per inch


def write_report(
    artefacts: Sequence[Artefact], folder: str | Path, title: str, about: Sequence[str]
) -> Path:
    """Write the report and remove tables and figures of `folder` that are no longer part of it.

    Args:
        folder: of the report, one below the results, since links to result files begin with `../`.
        about: paragraphs below the title.

    Returns:
        The HTML page.

    Raises:
        ValueError: what cannot be shown: names that repeat or are no file names, rows of another
            width than their header, measured numbers without a source, bytes that are no PNG.
        UsageError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the report")
    check(artefacts)
    blocks = [block for artefact in artefacts for block in artefact.blocks]
    tables = {block.name: table_csv(block) for block in blocks if isinstance(block, Table)}
    images = {block.name: png_of(block) for block in blocks if isinstance(block, Picture)}
    pages = {
        "report.md": markdown_page(artefacts, title, about),
        "report.html": html_page(artefacts, title, about, images),
    }

    _remove_others(folder / "tables", ".csv", tables)
    _remove_others(folder / "figures", ".png", images)
    for name, text in tables.items():
        write_atomic(folder / "tables" / f"{name}.csv", text)
    for name, png in images.items():
        _write_bytes(folder / "figures" / f"{name}.png", png)
    for name, text in pages.items():
        write_atomic(folder / name, text)
    return folder / "report.html"


def check(artefacts: Sequence[Artefact]) -> None:
    """Raise ValueError for what `write_report` cannot show."""
    blocks = [block for artefact in artefacts for block in artefact.blocks]
    _check_names("artefact", [artefact.name for artefact in artefacts])
    _check_names("table", [block.name for block in blocks if isinstance(block, Table)])
    _check_names("picture", [block.name for block in blocks if isinstance(block, Picture)])
    for block in blocks:
        if isinstance(block, Table):
            _check_table(block)


def _check_names(what: str, names: Sequence[str]) -> None:
    seen = set()
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{what} {name!r}: a name has letters, digits, _, . and - only")
        if name.lower() in seen:  # some file systems do not tell case
            raise ValueError(f"two {what}s have the name {name!r}: rename one")
        seen.add(name.lower())


def _check_table(table: Table) -> None:
    clash = sorted(set(table.header) & set(MARKERS))
    if clash:
        raise ValueError(f"table {table.name}: its CSV needs the column {clash[0]!r}, rename it")
    for number, row in enumerate(table.rows, 1):
        where = f"table {table.name}, row {number}"
        if len(row) != len(table.header):
            raise ValueError(f"{where} has {len(row)} cells, its header {len(table.header)}")
        for cell in row:
            if isinstance(cell, Number) and cell.kind == "measured" and not cell.sources:
                raise ValueError(f"{where}: {cell.text!r} has no source, name its result file")


def table_csv(table: Table) -> str:
    """Text of its CSV file, as the head of this file describes it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([visible(title) for title in (*table.header, *MARKERS)])
    for row in table.rows:
        paper = [
            title
            for title, cell in zip(table.header, row, strict=True)
            if isinstance(cell, Number) and cell.kind == "paper"
        ]
        sources = joined(source for cell in row for source in _measured_sources(cell))
        files = dict.fromkeys(source.file for source in sources)
        values = [*map(_csv_value, row), "; ".join(paper), "; ".join(files)]
        writer.writerow([visible(v) if isinstance(v, str) else v for v in values])
    return buffer.getvalue()


def _measured_sources(cell: Cell) -> Iterator[Source]:
    if isinstance(cell, Number) and cell.kind == "measured":
        yield from cell.sources


def _csv_value(cell: Cell) -> str | float | None:
    return cell if isinstance(cell, str) else cell.value


def png_of(picture: Picture) -> bytes:
    """The PNG of a picture, without the version of the library that drew it.

    Raises:
        ValueError: bytes that are no PNG.
    """
    if isinstance(picture.image, Figure):
        buffer = io.BytesIO()
        picture.image.savefig(
            buffer,
            format="png",
            dpi=CSS_DPI * DENSITY,
            facecolor="white",
            metadata={"Software": None},
        )
        return buffer.getvalue()
    if not picture.image.startswith(PNG_HEAD):
        raise ValueError(f"picture {picture.name}: its bytes are no PNG, encode it as one")
    return picture.image


def _remove_others(folder: Path, suffix: str, kept: dict[str, str] | dict[str, bytes]) -> None:
    """Delete the files of a folder that end in `suffix` and are not in `kept`."""
    for path in sorted(folder.glob(f"*{suffix}")):
        if path.name.removesuffix(suffix) not in kept:
            path.unlink()


def _write_bytes(path: Path, data: bytes) -> None:
    """Aside first, then renamed: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(data)
    os.replace(aside, path)
