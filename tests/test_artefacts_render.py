"""The report as files: what is shown, where each number leads, and that text stays text."""

import base64
import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from eval.artefacts.html import html_page
from eval.artefacts.markdown import markdown_page, plain, status, table_lines, visible
from eval.artefacts.model import (
    Artefact,
    Measured,
    Number,
    Picture,
    Source,
    Table,
    Text,
    measured,
    missing,
    of_paper,
    over_runs,
)
from eval.artefacts.write import write_report
from train.config import UsageError

A0 = Source("a/seed0/scores.json", "python -m eval.run --seed 0", "c0ffee0", 0)
A1 = Source("a/seed1/scores.json", "python -m eval.run --seed 1", "c0ffee1", 1)
KL = Source("kl/all.json", "python -m eval.kl_diagnostic", "c0ffee2", None)
HOSTILE = (
    "\n</pre></td><script>alert(\"1\")</script> & 'x' `y` | *b*\r\nz\x00\x1b[31m\u202eabc\ud800"
)
SHOWN = (
    "\n</pre></td><script>alert(\"1\")</script> & 'x' `y` | *b*\nz"
    "⟨U+0000⟩⟨U+001B⟩[31m⟨U+202E⟩abc⟨U+D800⟩"
)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text of all that is in it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self._open.append(len(self.elements))
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def find(self, tag: str, **attrs: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements with a tag and attributes (`class_` for class)."""
        wanted = {name.rstrip("_"): value for name, value in attrs.items()}
        return [
            (has, "".join(text))
            for name, has, text in self.elements
            if name == tag and wanted.items() <= has.items()
        ]


def drawing() -> Figure:
    figure = Figure(figsize=(4, 2))
    figure.subplots().plot([0, 1], [1, 3])
    return figure


def png(side: int = 3) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (side, 2 * side), "red").save(buffer, "PNG")
    return buffer.getvalue()


def sample() -> list[Artefact]:
    """A complete, a partly run and a missing artefact."""
    mean = over_runs([Measured(1 / 3, (A0,)), Measured(2 / 3, (A1,))])
    scores = Table(
        "scores",
        "Scores",
        ("system", "ours", "paper", "remark"),
        (
            ("a", measured(mean, "{:.2f}"), of_paper(0.625, "{:.3f}"), "good"),
            ("b", measured(Measured(-0.1234567, (A1,), -0.2, 0.1)), of_paper(4.64), ""),
        ),
        "A note.",
    )
    gaps = Table("gaps", "Gaps", ("task", "gap"), (("x", missing()), ("y", of_paper(2.0))))
    return [
        Artefact("one", "Scores of all", "Table 2", ("About it.",), (scores,)),
        Artefact(
            "two",
            "Gaps",
            "Figure 1",
            (),
            (
                Picture("drawn", "Drawn", "A rising line", drawing(), (KL,)),
                Picture("given", "Given", "A red field", png()),
                Text("Said", ("first", " second"), (KL, A0)),
                gaps,
            ),
            ("kl/x.json",),
            "bash run.sh --only two",
        ),
        Artefact("three", "Nothing yet", "", (), (gaps_only(),), ("z.json",), "bash run.sh <3>"),
    ]


def gaps_only() -> Table:
    return Table("none", "None", ("task", "gap", "paper"), (("x", missing(), of_paper(1.0)),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_report(sample(), tmp_path / "report", "A report", ("What it is.",))
    return tmp_path / "report"


@pytest.fixture
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_measured_numbers_lead_to_their_sources(page: Page) -> None:
    entries = {has["id"]: text for has, text in page.find("li") if "id" in has}
    cells = [(has, text) for has, text in page.find("a") if "title" in has]
    assert [text for _, text in cells] == ["0.50 ± 0.24", "-0.1 (-0.2 .. 0.1)"]

    joined, single = (entries[has["href"].removeprefix("#")] for has, _ in cells)
    assert joined == "sources 1, 2"  # an entry of its own, which names both runs
    assert cells[0][0]["title"] == (
        "a/seed0/scores.json, seed 0, commit c0ffee0\na/seed1/scores.json, seed 1, commit c0ffee1"
    )
    assert cells[1][0]["title"] == "a/seed1/scores.json, seed 1, commit c0ffee1"
    assert single == "a/seed1/scores.json, seed 1, commit c0ffee1\n\npython -m eval.run --seed 1"
    assert entries["source-3"].startswith("kl/all.json, several seeds, commit c0ffee2")
    assert {has["href"] for has, text in page.find("a") if text == A1.file} == {f"../{A1.file}"}


def test_every_inner_link_has_a_target_and_ids_are_unique(page: Page) -> None:
    ids = [has["id"] for _, has, _ in page.elements if "id" in has]
    assert len(ids) == len(set(ids))
    inner = {has["href"][1:] for has, _ in page.find("a") if has["href"].startswith("#")}
    assert inner == set(ids)  # nothing hangs, nothing is out of reach
    assert sum(i.startswith("source-") for i in ids) == 3


def test_values_of_the_paper_are_marked_and_no_links(page: Page, folder: Path) -> None:
    values = [text for _, text in page.find("span", class_="paper")]
    assert values == ["0.12†", "0.625†", "4.64†", "2.00†", "1.00†"]  # the first is of the legend
    assert not [text for _, text in page.find("a") if "†" in text]
    lines = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"\d\.\d+ †", lines) == ["0.625 †", "4.64 †", "2.00 †", "1.00 †"]


def test_a_source_of_a_paper_value_is_not_listed() -> None:
    table = Table("t", "T", ("a", "b"), (("x", replace(of_paper(1.0), sources=(A0,))),))
    page = html_page([Artefact("n", "N", "", (), (table,))], "T", (), {})
    assert A0.file not in page


def test_status_and_remedy(page: Page, folder: Path) -> None:
    assert [status(artefact) for artefact in sample()] == ["complete", "partly", "not run"]
    badges = [text for has, text in page.find("span") if has.get("class", "").startswith("badge")]
    assert badges == ["complete", "partly", "not run"] * 2  # in the contents and at each artefact
    commands = [text.removeprefix("\n") for _, text in page.find("pre", class_="command")]
    assert commands[:2] == ["bash run.sh --only two", "bash run.sh <3>"]
    lines = (folder / "report.md").read_text(encoding="utf-8")
    assert "- `z.json`\n\nTo make what is missing:\n\n```bash\nbash run.sh <3>\n```\n" in lines
    assert len(page.find("span", class_="missing")) == 3  # two cells and the legend


def test_status_follows_cells_as_well_as_files() -> None:
    one, two, three = sample()
    assert status(replace(one, missing=("a.json",))) == "partly"
    assert status(replace(two, missing=())) == "partly"  # a cell is missing
    assert status(replace(three, missing=())) == "not run"  # the paper's value is no run
    assert status(replace(three, missing=(), blocks=())) == "not run"


def test_page_needs_nothing_else(page: Page, folder: Path) -> None:
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed"}
    assert not [name for _, has, _ in page.elements for name in has if name.startswith("on")]
    assert "url(" not in "".join(text for _, text in page.find("style"))
    sources = [has["src"] for has, _ in page.find("img")]
    files = [folder / "figures" / f"{name}.png" for name in ("drawn", "given")]
    for source, file in zip(sources, files, strict=True):
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == file.read_bytes()
    [drawn, given] = [has for has, _ in page.find("img")]
    assert (drawn["width"], drawn["height"]) == ("384", "192")  # 4 by 2 inches of 96 pixels
    assert (given["width"], given["height"]) == ("3", "6")
    assert PIL.Image.open(files[0]).size == (576, 288)


def hostile(text: str) -> list[Artefact]:
    """An artefact with the same text wherever text may stand."""
    source = Source(text, text, text, 0)
    cells = (text, Number(text, 1.5, "measured", (source,)), Number(text, 1.0, "paper"))
    table = Table("t", text, (text, f"{text}2", f"{text}3"), (cells,), text)
    blocks = (table, Picture("p", text, text, png(), (source,)), Text(text, (text,), (source,)))
    return [Artefact("n", text, text, (text,), blocks, (text,), text)]


def shape(page: Page) -> list[tuple[str, list[str]]]:
    return [
        (tag, [name for name in has if name != "class"])  # `long` comes and goes with the text
        for tag, has, _ in page.elements
    ]


def test_text_is_never_markup() -> None:
    page = Page(html_page(hostile(HOSTILE), HOSTILE, (HOSTILE,), {"p": png()}))
    plain_page = Page(html_page(hostile("word"), "word", ("word",), {"p": png()}))
    assert shape(page) == shape(plain_page)
    assert page.find("h1")[0][1] == SHOWN
    assert page.find("pre", class_="text")[0][1] == f"\n{SHOWN}"  # the parser drops the first \n
    assert page.find("pre", class_="command")[0][1] == f"\n{SHOWN}"
    assert page.find("img")[0][0]["alt"] == SHOWN
    assert page.find("th", scope="row")[0][1] == SHOWN
    number = next(has for has, _ in page.find("a") if "title" in has)
    assert number["title"] == f"{SHOWN}, seed 0, commit {SHOWN}"
    files = [has["href"] for has, text in page.find("a") if has["href"].startswith("../")]
    assert [re.search(r"""[\s<>"'()\\]""", file) for file in files] == [None]


# Characters that mean something to HTML or markdown, or cannot be seen; and any other.
NASTY = st.text(st.sampled_from(list("<>&\"'`*_|\\[]()~$:/#-=+1. \n\r\t\x00\x7f\u202e\ud800é")))


@settings(max_examples=60, deadline=None)
@given(st.one_of(NASTY, st.text()))
def test_any_text_comes_back_from_the_page(text: str) -> None:
    table = Table("t", "T", ("a", "b"), (("x", text),))
    said = Artefact("n", "N", "", (), (table, Text("S", (text,))))
    document = html_page([said], "T", (), {})
    document.encode("utf-8")
    page = Page(document)
    assert page.find("td")[0][1] == visible(text)
    assert page.find("pre", class_="text")[0][1] == f"\n{visible(text)}"
    assert "\r" not in document and "\x00" not in document


@settings(max_examples=200, deadline=None)
@given(st.one_of(NASTY, st.text()))
def test_any_text_stays_one_cell_of_markdown(text: str) -> None:
    lines = table_lines(Table("t", "T", ("a", "b"), ((text, "end"),)))
    assert len(lines) == 3
    assert len(lines[2].splitlines()) == 1
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", lines[2]).replace("<br>", "")  # without escapes
    assert bare.count("|") == 3
    assert not set(bare) & set("\\`*[]<>$~&")
    back = plain(text).replace("<br>", "\n")
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", back) == visible(text).strip()


def test_markdown_of_hostile_text_keeps_its_blocks() -> None:
    text = "```\n# no heading\n<script>"
    page = markdown_page(hostile(text), text, (f"- {text}", "1. no list"))
    assert re.findall("^#+ .*", page.split("````")[0], re.MULTILINE) == [
        r"# \`\`\` # no heading \<script\>",
        r"## \`\`\` # no heading \<script\>",
        *[r"### \`\`\` # no heading \<script\>"] * 3,
    ]
    assert "\n````\n```\n# no heading\n<script>\n````\n" in page  # fenced by a longer fence
    assert "\n````bash\n" in page
    assert "\n\\- \\`" in page and "\n1\\. no list\n" in page
    outside = re.sub(r"(?s)(`{4,}).*?\1", "", page)
    assert "<script>" not in outside.replace("\\<script", "")


def test_markdown_tables_and_sources(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A report\n\nWhat it is.\n\n† marks")
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    assert ["[Gaps](#two)", "Figure 1", "partly"] in rows
    assert ["a", "0.50 ± 0.24", "0.625 †", "good"] in rows
    assert ["b", "-0.1 (-0.2 .. 0.1)", "4.64 †", ""] in rows
    assert ["x", "not run", "1.00 †"] in rows
    assert "![A rising line](figures/drawn.png)" in text
    first = text.split('<a id="two">')[0]
    assert (
        "1. [`a/seed0/scores.json`](../a/seed0/scores.json), seed 0, commit `c0ffee0`: "
        "`python -m eval.run --seed 0`\n2. [`a/seed1" in first
    )
    assert "kl/all.json" not in first and "several seeds" in text
    for target in re.findall(r"\]\((?!\.\./|#)([^)]+)\)", text):
        assert (folder / target).is_file()


def test_rows_of_one_name_are_numbered_in_markdown() -> None:
    table = Table("t", "T", ("id", "kl"), (("x", "1"), ("x", "2"), ("y", "3")))
    rows = [re.split(r" *\| *", line)[1:-1] for line in table_lines(table)]
    assert rows[0] == ["No.", "id", "kl"]
    assert rows[2:] == [["1", "x", "1"], ["2", "x", "2"], ["3", "y", "3"]]


def test_csv_is_unrounded_and_names_its_files(folder: Path) -> None:
    with open(folder / "tables" / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["system", "ours", "paper", "remark", "paper_columns", "sources"]
    assert rows[1] == ["a", "0.5", "0.625", "good", "paper", f"{A0.file}; {A1.file}"]
    assert rows[2] == ["b", "-0.1234567", "4.64", "", "paper", A1.file]
    none = (folder / "tables" / "none.csv").read_text(encoding="utf-8")
    assert none == "task,gap,paper,paper_columns,sources\nx,,1.0,paper,\n"


@pytest.mark.parametrize("rows", [30, 31])
def test_long_tables_and_texts_fold(rows: int) -> None:
    table = Table("t", "T", ("a", "b"), tuple((f"row {n}", "x") for n in range(rows)))
    long = Artefact("n", "N", "", (), (table, Text("S", tuple("x" * rows))))
    folds = [text for _, text in Page(html_page([long], "T", (), {})).find("summary")]
    text = markdown_page([long], "T", ())
    assert folds == ([f"{rows} rows", f"{rows} lines"] if rows > 30 else [])
    assert text.count("<details>") == len(folds) == text.count("</details>")


def test_the_same_artefacts_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_report(sample(), tmp_path / "again", "A report", ("What it is.",))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert [str(file) for file in files] == [
        "figures/drawn.png", "figures/given.png", "report.html", "report.md",
        "tables/gaps.csv", "tables/none.csv", "tables/scores.csv",
    ]  # fmt: skip
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    info = PIL.Image.open(folder / "figures" / "drawn.png").info
    assert set(info) == {"dpi"}  # neither a date nor the version of the library


def test_nothing_stale_stays(folder: Path) -> None:
    (folder / "notes.txt").write_text("kept")
    write_report(sample()[:1], folder, "A report", ())
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "notes.txt", "report.html", "report.md", "scores.csv",
    ]  # fmt: skip
    assert "kl/all.json" not in (folder / "report.html").read_text(encoding="utf-8")


def changed(**changes: object) -> Table:
    return replace(Table("t", "T", ("a", "b"), (("x", "y"),)), **changes)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([changed(name="../t")], "table '../t': a name has letters"),
        ([changed(name="T"), changed()], "two tables have the name 't'"),
        ([changed(header=("a", "sources"))], "table t: its CSV needs the column 'sources'"),
        ([changed(rows=(("x",),))], "table t, row 1 has 1 cells, its header 2"),
        ([changed(rows=(("x", Number("7", 7, "measured")),))], "row 1: '7' has no source"),
        ([Picture("p", "P", "", b"GIF89a")], "picture p: its bytes are no PNG"),
    ],
)
def test_what_cannot_be_shown_is_refused(blocks: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report([Artefact("n", "N", "", (), tuple(blocks))], tmp_path / "r", "T", ())
    assert not (tmp_path / "r").exists()


def test_artefacts_need_names_of_their_own(tmp_path: Path) -> None:
    one = Artefact("n", "N", "", (), ())
    with pytest.raises(ValueError, match="two artefacts have the name 'n'"):
        write_report([one, one], tmp_path, "T", ())


def test_a_file_is_no_folder_for_a_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file: name a folder"):
        write_report([], tmp_path / "file", "T", ())
