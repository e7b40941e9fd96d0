"""The report as markdown for GitHub: tables, pictures by relative path, sources per artefact.

Text of runs is shown, never interpreted: what markdown or HTML would read as markup is escaped,
and characters that cannot be seen are written as their codes.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from eval.artefacts.model import Artefact, Cell, Number, Picture, Source, Table, Text, joined
from eval.session import markdown_table

DAGGER = "†"
LEGEND = (
    f"{DAGGER} marks the paper's own value. Numbers without it were measured here, from the files "
    'below each table; "not run" stands where there is no result file.'
)
COMPLETE, PARTLY, NONE = "complete", "partly", "not run"
FOLDED = 30  # longer tables, texts and lists open on a click

JOINERS = "\u200c\u200d"  # unseen, but emoji and some scripts need them
MARKUP = re.compile(r"[\\`*\[\]<>|$~&]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.")


def visible(text: str) -> str:
    """Control characters, direction marks and lone surrogates by their code; tab, newline stay."""
    lines = text.replace("\r\n", "\n")
    return lines if lines.isprintable() else "".join(map(_sign, lines))


def _sign(char: str) -> str:
    if char in "\n\t" + JOINERS:
        return char
    code = ord(char)
    unseen = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"⟨U+{code:04X}⟩" if unseen or code & 0xFFFE == 0xFFFE else char


def status(artefact: Artefact) -> str:
    """`complete`, `partly`, or `not run` where nothing of it comes from a run."""
    cells = list(cells_of(artefact))
    if not artefact.missing and artefact.blocks and not any(c.kind == "missing" for c in cells):
        return COMPLETE
    return PARTLY if any(origins(artefact)) else NONE


def cells_of(artefact: Artefact) -> Iterator[Number]:
    """The numbers of its tables, row by row."""
    for block in artefact.blocks:
        if isinstance(block, Table):
            yield from (cell for row in block.rows for cell in row if isinstance(cell, Number))


def origins(artefact: Artefact) -> Iterator[tuple[Source, ...]]:
    """In their order, the sources of each measured number, and each of a picture or text."""
    for block in artefact.blocks:
        if isinstance(block, Table):
            cells = (cell for row in block.rows for cell in row)
            yield from (
                joined(cell.sources)
                for cell in cells
                if isinstance(cell, Number) and cell.kind == "measured" and cell.sources
            )
        else:
            yield from ((source,) for source in block.sources)


def seed_of(source: Source) -> str:
    return "several seeds" if source.seed is None else f"seed {source.seed}"


def link_to(file: str) -> str:
    """A result file as seen from the report, which lies one folder below the results."""
    return f"../{quote(visible(file))}"


def plain(text: str) -> str:
    """Text of one line in which no character is markup; line breaks become <br>."""
    return MARKUP.sub(r"\\\g<0>", visible(text).strip()).replace("\n", "<br>")


def paragraph(text: str) -> str:
    """A paragraph in which no character is markup, not even a leading `-` or `1.`."""
    words = plain(" ".join(visible(text).split()))
    return re.sub(r"^(\d*)([-+#=.)])", r"\1\\\2", words)


def code(text: str) -> str:
    """An inline code span, with a fence longer than any in the text."""
    line = " ".join(visible(text).split("\n"))
    fence = _fence(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str = "") -> list[str]:
    """Lines of a fenced code block."""
    shown = visible(text)
    fence = _fence(shown, 3)
    return [fence + language, *shown.split("\n"), fence]


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def cell(value: Cell) -> str:
    """A cell as it is shown, those of the paper with a dagger."""
    if isinstance(value, str):
        return plain(value)
    return f"{plain(value.text)} {DAGGER}" if value.kind == "paper" else plain(value.text)


def table_lines(table: Table) -> list[str]:
    """Lines of its markdown table. Where names of rows repeat, the rows are numbered."""
    header = [plain(title) for title in table.header]
    rows = [[cell(value) for value in row] for row in table.rows]
    if len({row[0] for row in rows}) < len(rows):
        header.insert(0, "No.")
        rows = [[str(number), *row] for number, row in enumerate(rows, 1)]
    return markdown_table(header, {row[0]: row[1:] for row in rows})


def markdown_page(artefacts: Sequence[Artefact], title: str, about: Sequence[str]) -> str:
    """The whole report. about: paragraphs below the title."""
    rows = {
        f"[{plain(artefact.title)}](#{artefact.name})": [plain(artefact.place), status(artefact)]
        for artefact in artefacts
    }
    lines = [f"# {paragraph(title)}", "", *_paragraphs([*about, LEGEND])]
    lines += [*markdown_table(["Artefact", "In the paper", "Status"], rows), ""]
    for artefact in artefacts:
        lines += _section(artefact)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(artefact: Artefact) -> list[str]:
    place = f"{paragraph(artefact.place)}; " if artefact.place else ""
    lines = [f'<a id="{artefact.name}"></a>', "", f"## {paragraph(artefact.title)}", ""]
    lines += [f"{place}status: **{status(artefact)}**", "", *_paragraphs(artefact.about)]
    for block in artefact.blocks:
        lines += [f"### {paragraph(block.title)}", "", *_block(block), ""]
    if artefact.missing:
        files = [f"- {code(file)}" for file in artefact.missing]
        lines += ["Not run; missing:", "", *_folded(files, len(files), "entries"), ""]
    if artefact.remedy:
        lines += ["To make what is missing:", "", *code_block(artefact.remedy, "bash"), ""]
    sources = joined(source for sources in origins(artefact) for source in sources)
    if sources:
        listed = [_source(number, source) for number, source in enumerate(sources, 1)]
        lines += ["Sources:", "", *_folded(listed, len(listed), "sources"), ""]
    return lines


def _block(block: Table | Picture | Text) -> list[str]:
    match block:
        case Table():
            lines = _folded(table_lines(block), len(block.rows), "rows")
            note = _paragraphs([block.note] if block.note else [])
            return [*lines, "", *note, f"[CSV](tables/{block.name}.csv)"]
        case Picture():
            return [f"![{paragraph(block.alt)}](figures/{block.name}.png)"]
        case Text():
            return _folded(code_block("\n".join(block.lines)), len(block.lines), "lines")


def _source(number: int, source: Source) -> str:
    file = f"[{code(source.file)}]({link_to(source.file)})"
    commit, command = code(source.commit), code(source.command)
    return f"{number}. {file}, {seed_of(source)}, commit {commit}: {command}"


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (paragraph(text), "")]


def _folded(lines: list[str], count: int, what: str) -> list[str]:
    """The lines, behind a click where there are many of them."""
    if count <= FOLDED:
        return lines
    return [f"<details><summary>{count} {what}</summary>", "", *lines, "", "</details>"]
