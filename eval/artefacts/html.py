"""The report as one HTML page that needs nothing else: no script, no server, pictures inside.

All text is escaped. Each measured number is a link to the list of sources at the end; those that
join several runs go by an entry of their own, which names the runs.
"""

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from eval.artefacts.markdown import (
    COMPLETE,
    DAGGER,
    FOLDED,
    NONE,
    PARTLY,
    link_to,
    origins,
    seed_of,
    status,
    visible,
)
from eval.artefacts.model import Artefact, Cell, Number, Picture, Source, Table, Text, joined

DENSITY = 1.5  # pixels of a drawn figure per pixel of the page
LONG = 32  # characters from which on a cell of text gets room to wrap
STYLE = Path(__file__).with_name("page.css")
# Belt and braces: should an escape be missing, the browser still runs and loads nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
Item = TypeVar("Item")
BADGES = {COMPLETE: "complete", PARTLY: "partly", NONE: "none"}


@dataclass(frozen=True)
class Origins:
    """Numbers of the sources and of the groups of sources, by first appearance, from 1."""

    sources: Mapping[Source, int]
    groups: Mapping[tuple[Source, ...], int]

    @classmethod
    def of(cls, artefacts: Iterable[Artefact]) -> "Origins":
        used = dict.fromkeys(sources for artefact in artefacts for sources in origins(artefact))
        singles = joined(source for sources in used for source in sources)
        return cls(_numbered(singles), _numbered(group for group in used if len(group) > 1))

    def anchor(self, sources: tuple[Source, ...]) -> str:
        """Where these sources stand in the list at the end."""
        if len(sources) == 1:
            return f"source-{self.sources[sources[0]]}"
        return f"runs-{self.groups[sources]}"

    def links(self, sources: Iterable[Source]) -> str:
        """Their numbers, as links."""
        numbers = (self.sources[source] for source in sources)
        return ", ".join(f'<a href="#source-{number}">{number}</a>' for number in numbers)


def _numbered(items: Iterable[Item]) -> dict[Item, int]:
    return {item: number for number, item in enumerate(items, 1)}


def shown(text: str) -> str:
    """Text for an element or a quoted attribute."""
    return escape(visible(text), quote=True)


def html_page(
    artefacts: Sequence[Artefact],
    title: str,
    about: Sequence[str],
    images: Mapping[str, bytes],
) -> str:
    """The whole page. about: paragraphs below the title. images: name of a picture -> its PNG."""
    found = Origins.of(artefacts)
    body = "\n".join(_section(artefact, found, images) for artefact in artefacts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{shown(title)}</h1>
{_paragraphs(about)}
{_legend()}
</header>
<div class="columns">
{_contents(artefacts)}
<main>
{body}
{_sources(found)}
</main>
</div>
</body>
</html>
"""


def _legend() -> str:
    return (
        f'<p class="legend"><span class="paper">0.12{DAGGER}</span> is the paper\'s own value. '
        "An underlined number was measured here, and leads to its file, command, seed and commit. "
        '<span class="missing">not run</span> stands where there is no result file. '
        "Characters that cannot be seen are written as their codes: ⟨U+202E⟩.</p>"
    )


def _contents(artefacts: Sequence[Artefact]) -> str:
    entries = "\n".join(
        f'<li><a href="#a-{shown(artefact.name)}">{shown(artefact.title)}</a> '
        f'<span class="place">{shown(artefact.place)}</span> {_badge(artefact)}</li>'
        for artefact in artefacts
    )
    return (
        f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<ol>\n{entries}\n'
        '<li><a href="#sources">Sources</a></li>\n</ol>\n</nav>'
    )


def _badge(artefact: Artefact) -> str:
    word = status(artefact)
    return f'<span class="badge {BADGES[word]}">{word}</span>'


def _section(artefact: Artefact, found: Origins, images: Mapping[str, bytes]) -> str:
    place = f'<span class="place">{shown(artefact.place)}</span> ' if artefact.place else ""
    parts = [
        f'<section id="a-{shown(artefact.name)}">\n<h2>{shown(artefact.title)}</h2>',
        f'<p class="status">{place}{_badge(artefact)}</p>',
        _paragraphs(artefact.about),
        *(_block(block, found, images) for block in artefact.blocks),
        _missing(artefact),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _missing(artefact: Artefact) -> str:
    """What was not run, and the command that runs it; a click selects the whole command."""
    parts = []
    if artefact.missing:
        files = "".join(f"<li><code>{shown(file)}</code></li>" for file in artefact.missing)
        listed = _folded(f"<ul>{files}</ul>", len(artefact.missing), "missing entries")
        parts.append(f"<p>Not run; missing:</p>\n{listed}")
    if artefact.remedy:
        parts.append(f"<p>To make what is missing:</p>\n{_command(artefact.remedy)}")
    return '<div class="gap">\n' + "\n".join(parts) + "\n</div>" if parts else ""


def _command(text: str) -> str:
    return f'<pre class="command">\n{shown(text)}</pre>'


def _block(block: Table | Picture | Text, found: Origins, images: Mapping[str, bytes]) -> str:
    match block:
        case Table():
            return _table(block, found)
        case Picture():
            return _picture(block, found, images[block.name])
        case Text():
            lines = shown("\n".join(block.lines))
            # The parser drops a line break right behind <pre>: this one, not one of the text.
            text = _folded(f'<pre class="text">\n{lines}</pre>', len(block.lines), "lines")
            return f"<div>\n{_caption(block.title)}\n{text}\n{_from(block.sources, found)}</div>"


def _table(table: Table, found: Origins) -> str:
    columns = [[row[column] for row in table.rows] for column in range(len(table.header))]
    # What is a sentence, though a number begins it, reads as text.
    numeric = [
        any(isinstance(cell, Number) for cell in cells) and max(map(_length, cells)) <= LONG
        for cells in columns
    ]
    head = "".join(
        f'<th scope="col"{_class(number=number)}>{shown(title)}</th>'
        for title, number in zip(table.header, numeric, strict=True)
    )
    rows = "\n".join(f"<tr>{_row(row, numeric, found)}</tr>" for row in table.rows)
    label = shown(table.title)
    # Focusable, so that the keyboard can scroll it.
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )
    note = f'<p class="note">{shown(table.note)}</p>\n' if table.note else ""
    return (
        f"<div>\n{_caption(table.title)}\n{_folded(body, len(table.rows), 'rows')}\n{note}"
        f'<p class="note"><a href="tables/{shown(table.name)}.csv">CSV</a></p>\n</div>'
    )


def _length(value: Cell) -> int:
    return len(value if isinstance(value, str) else value.text)


def _row(row: Sequence[Cell], numeric: Sequence[bool], found: Origins) -> str:
    cells = []
    for column, (value, number) in enumerate(zip(row, numeric, strict=True)):
        kind = _class(number=number, long=not number and _length(value) > LONG)
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        cells.append(f"<{tag}{scope}{kind}>{_cell(value, found)}</{tag}>")
    return "".join(cells)


def _class(**names: bool) -> str:
    given = " ".join(name for name, holds in names.items() if holds)
    return f' class="{given}"' if given else ""


def _cell(value: Cell, found: Origins) -> str:
    if isinstance(value, str):
        return shown(value)
    if value.kind == "measured":
        sources = joined(value.sources)
        return (
            f'<a href="#{found.anchor(sources)}" title="{_title(sources)}">{shown(value.text)}</a>'
        )
    if value.kind == "paper":
        title = "the paper's own value, not measured here"
        return f'<span class="paper" title="{title}">{shown(value.text)}{DAGGER}</span>'
    return f'<span class="missing">{shown(value.text)}</span>'


def _title(sources: Iterable[Source]) -> str:
    return shown("\n".join(f"{s.file}, {seed_of(s)}, commit {s.commit}" for s in sources))


def _picture(picture: Picture, found: Origins, png: bytes) -> str:
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
    density = DENSITY if isinstance(picture.image, Figure) else 1
    size = f'width="{width / density:.0f}" height="{height / density:.0f}"'
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure>\n{_caption(picture.title)}\n"
        f'<img {size} alt="{shown(picture.alt)}" src="data:image/png;base64,{data}">\n'
        f"{_from(picture.sources, found)}</figure>"
    )


def _from(sources: Sequence[Source], found: Origins) -> str:
    if not sources:
        return ""
    links = found.links(joined(sources))
    return f'<p class="note">Sources: {links}</p>\n'


def _sources(found: Origins) -> str:
    """Every source once; below, which of them the joined numbers join."""
    listed = "\n".join(
        f'<li id="source-{number}"><a href="{shown(link_to(source.file))}">{shown(source.file)}</a>'
        f", {seed_of(source)}, commit <code>{shown(source.commit)}</code>"
        f"\n{_command(source.command)}</li>"
        for source, number in found.sources.items()
    )
    groups = "\n".join(
        f'<li id="runs-{number}">sources {found.links(group)}</li>'
        for group, number in found.groups.items()
    )
    several = (
        "<h3>Numbers from several sources</h3>\n<p>Such a number links here.</p>\n"
        f'<ol class="runs">\n{groups}\n</ol>'
    )
    return (
        '<section id="sources">\n<h2>Sources</h2>\n'
        f"<ol>\n{listed}\n</ol>\n{several if groups else ''}\n</section>"
    )


def _caption(title: str) -> str:
    return f"<h3>{shown(title)}</h3>"


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{shown(text)}</p>" for text in texts)


def _folded(body: str, count: int, what: str) -> str:
    if count <= FOLDED:
        return body
    return f"<details>\n<summary>{count} {what}</summary>\n{body}\n</details>"
