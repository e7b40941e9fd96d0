"""The report as a whole: what a lost or damaged file does; what the command writes and copies."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from eval.artefacts import pictures
from eval.artefacts.catalogue import ARTEFACTS
from eval.artefacts.markdown import status
from eval.artefacts.model import Artefact, Cell, Number, Picture, Table
from eval.report import collect, ledger_page, main, publish
from tests.invented_results import (
    FILES,
    METRICS,
    OVERALL,
    PICTURES,
    PLAN,
    SEEDS,
    Drawn,
    beside,
    collected,
    is_missing,
    kl,
    made,
    raw,
    tables_of,
    write_file,
    written,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Invented results; tests that change them put them back."""
    return made(tmp_path_factory.mktemp("results"))


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    """Figures are not drawn; what they would be given is kept."""
    drawn = Drawn()
    monkeypatch.setattr(pictures, "figures", drawn)
    return drawn


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[Artefact], dict[str, list[tuple[tuple, dict]]]]:
    """All artefacts of the whole folder, and what was to be drawn."""
    return collected(folder)


def rows_of(artefacts: Iterable[Artefact]) -> dict[tuple[str, str], dict[str, Cell]]:
    """(table, title of the row) -> column -> cell."""
    found = {}
    for table in tables_of(artefacts).values():
        for row in table.rows:
            leading = [*takewhile(lambda cell: isinstance(cell, str), row)]
            title = " | ".join(leading[:2]) if table.name == "checkpoints" else str(row[0])
            assert (table.name, title) not in found
            found[table.name, title] = dict(zip(table.header, row, strict=True))
    return found


def uses(cell: Cell, file: str) -> bool:
    return isinstance(cell, Number) and file in {source.file for source in cell.sources}


def check_rows(before: Iterable[Artefact], after: Iterable[Artefact], lost: str) -> set[str]:
    """Compare all cells; returns the tables that a lost file took something from."""
    old, new, touched = rows_of(before), rows_of(after), set()
    for (table, title), row in old.items():
        now = new.get((table, title))
        if not any(uses(cell, lost) for cell in row.values()):
            if table != "ledger_rules":
                assert now == row, (table, title)
            continue
        touched.add(table)
        for column, cell in row.items():
            there = None if now is None else now.get(column)
            if uses(cell, lost):
                assert is_missing(there), (table, title, column, there)
            elif isinstance(cell, Number) and cell.kind == "measured":
                assert there == cell, (table, title, column)
        if table == "ledger":
            assert now is not None and now["status"] == "not run"
            assert "no results" in new["ledger_rules", title]["rule and reason"]
    for (table, title), row in new.items():
        assert not any(uses(cell, lost) for cell in row.values())
        assert (table, title) in old or all(
            isinstance(c, str) or c.kind == "missing" for c in row.values()
        )
    for table in touched:
        rows = [row for (name, _), row in new.items() if name == table]
        assert any(is_missing(cell) for row in rows for cell in row.values()), table
    return touched


@contextmanager
def without(folder: Path, aside: Path, lost: str) -> Iterator[None]:
    """A file moved away for a while."""
    (folder / lost).rename(aside / "lost")
    try:
        yield
    finally:
        (aside / "lost").rename(folder / lost)


def lost_of(artefact: Artefact, lost: str) -> bool:
    """Whether anything of it comes from a file."""
    cells = [c for b in artefact.blocks if isinstance(b, Table) for row in b.rows for c in row]
    return any(uses(cell, lost) for cell in cells) or any(
        lost in {source.file for source in block.sources} for block in beside(artefact).values()
    )


@pytest.mark.parametrize("lost", [*FILES, *METRICS])
def test_a_lost_file_is_not_run_and_nothing_else_changes(folder, tmp_path, whole, drawn, lost):
    with without(folder, tmp_path, lost):
        after = collect(folder)[0]
    check_rows(whole[0], after, lost)
    hit = [artefact.name for artefact in whole[0] if lost_of(artefact, lost)]
    assert hit, f"nothing is made of {lost}"
    for old, new in zip(whole[0], after, strict=True):
        if old.name not in hit:
            assert new == old
            continue
        assert any(entry.startswith(lost) for entry in new.missing)
        assert all(entry.startswith(lost) for entry in new.missing)
        assert new.remedy == f"{PLAN['command']} --only {new.name}"
        assert status(new) in ("partly", "not run")
        kept = beside(new)
        assert set(kept) <= set(beside(old))
        for name, block in beside(old).items():
            used = lost in {source.file for source in block.sources}
            assert used or kept[name] == block, (new.name, name)
            assert name not in kept or lost not in {s.file for s in kept[name].sources}


@pytest.mark.parametrize("lost", PICTURES)
def test_a_lost_picture_of_a_case_is_named_and_not_described(folder, tmp_path, whole, drawn, lost):
    with without(folder, tmp_path, lost):
        after = collect(folder)[0]
    for old, new in zip(whole[0], after, strict=True):
        if old.name != "cases":
            assert new == old
            continue
        assert new.missing == (lost,)
        assert new.remedy == f"{PLAN['command']} --only cases"
        told = {"-problem-": "1 problem", "-true-": "1 true", "-thinkmorph-": "1 drawn"}
        (gone,) = [text for part, text in told.items() if part in lost]
        strips = [block for block in new.blocks if isinstance(block, Picture)]
        strip = strips[PICTURES.index(lost) // 3]  # of each case three pictures
        assert [text for text in told.values() if text in strip.alt] == [
            text for text in told.values() if text != gone
        ]


def test_nothing_run_is_not_run_everywhere(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    main([str(tmp_path)])
    artefacts, results = collect(tmp_path)
    assert results.read == []
    for artefact in artefacts:
        assert status(artefact) == "not run", artefact.name
        assert artefact.remedy == f"{PLAN['command']} --only {artefact.name}"
        assert beside(artefact) == {}
        cells = [c for b in artefact.blocks if isinstance(b, Table) for row in b.rows for c in row]
        assert not any(isinstance(cell, Number) and cell.kind == "measured" for cell in cells)
    for table in tables_of(artefacts).values():
        if not table.name.endswith("_paper") and table.name != "ledger_rules":
            assert any(is_missing(cell) for row in table.rows for cell in row), table.name
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert page.count("status: **not run**") == len(ARTEFACTS)
    assert not list((tmp_path / "report").glob("figures/*"))


TEXTS = ("report/report.md", "report/report.html")


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the results with things beside that no report reads; what was published of it."""
    place = tmp_path_factory.mktemp("published")
    shutil.copytree(folder, place / "runs")
    beside = ("steps/theorem.json", "seed0/kl/records.jsonl", "seed0/opsd/gates.jsonl")
    for file in (*beside, "microscope_opsd/microscope.html"):  # a page without its records
        (place / "runs" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "runs" / file).write_text("[]", encoding="utf-8")
    ledger = str(place / "ledger.md")
    main([str(place / "runs"), "--publish", str(place / "copy"), "--ledger", ledger])
    return place / "runs", place / "copy"


def test_published_is_what_was_read_and_its_report_is_the_same(published):
    runs, copy = (written(folder) for folder in published)
    copied = {name for name in copy if not name.startswith("report/")}
    assert copied == {*FILES, *METRICS, *PICTURES, "plan.json", "microscope/microscope.html"}
    assert all(copy[name] == runs[name] for name in copied)
    tables = {name for name in runs if name.startswith("report/tables/")}
    assert len(tables) == len(tables_of(collected(published[0])[0]))
    for name in copy.keys() - copied | tables:
        assert copy[name] == runs[name], name


def test_two_runs_write_the_same_bytes(published):
    before = written(published[0])
    main([str(published[0])])
    after = written(published[0])
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert {*TEXTS} <= set(before)


def test_csv_holds_the_unrounded_numbers_and_their_files(published):
    text = (published[1] / "report/tables/table1.csv").read_text(encoding="utf-8").splitlines()
    want = kl("pre", OVERALL)
    name, n, k, paper, columns, sources = text[5].split(",")
    assert (name, float(k), paper, columns) == ("overall", want.value, "4.64", "paper")
    assert sources.split("; ") == [f"seed{seed}/kl/summary.json" for seed in SEEDS]
    assert float(n) == sum(raw(f"seed{seed}/kl/summary.json", "n").value for seed in SEEDS)


def test_ledger_document_is_of_the_published_copy(published):
    text = (published[0].parent / "ledger.md").read_text(encoding="utf-8")
    assert text == ledger_page(published[1])
    assert f"{published[1]}/seed0/pairs.json" in text


def test_publishing_again_replaces_an_earlier_copy(published, tmp_path, drawn):
    shutil.copytree(published[1], tmp_path / "copy")
    (tmp_path / "copy" / "seed0" / "old.json").write_text("[]", encoding="utf-8")
    publish(published[0], tmp_path / "copy")
    again, first = written(tmp_path / "copy"), written(published[1])
    assert again.keys() == first.keys()
    same_now = {name for name in first if again[name] == first[name]}
    assert {name for name in first if name not in TEXTS and "/figures/" not in name} <= same_now


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "Traceback" not in said
    return said


@pytest.mark.parametrize("kind", ["foreign", "itself", "parent", "runs", "file"])
def test_nothing_is_deleted_that_is_no_earlier_copy(published, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr("eval.report.report", lambda folder: folder)  # it is written elsewhere here
    ignored = shutil.ignore_patterns("report", "steps")
    shutil.copytree(published[0], tmp_path / "in" / "runs", ignore=ignored)
    target = {
        "foreign": tmp_path / "foreign", "itself": tmp_path / "in" / "runs",
        "parent": tmp_path / "in", "runs": tmp_path / "other", "file": tmp_path / "file",
    }[kind]  # fmt: skip
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "in" / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    (tmp_path / "other" / "steps").mkdir(parents=True)
    (tmp_path / "other" / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    before = written(tmp_path)
    said = refused(capsys, str(tmp_path / "in" / "runs"), "--publish", str(target))
    assert str(target) in said
    assert written(tmp_path) == before


def test_a_folder_without_a_plan_is_one_line(tmp_path, capsys):
    said = refused(capsys, str(tmp_path))
    assert "plan.json is missing" in said
    assert not list(tmp_path.iterdir())


DAMAGED = {  # file -> how its text is spoiled
    "seed0/pairs.json": lambda text: text[: len(text) // 2],
    "seed1/opsd/validation.jsonl": lambda text: text[:-30],
    "seed0/opsd/metrics.jsonl": lambda text: text[:-30],
    "theorem/theorem.json": lambda text: text.replace('"commit"', '"comit"'),
    "seed0/kl/summary.json": lambda text: "",
    "seed0/noise/metrics.jsonl": lambda text: text.replace("step", "st\udcff"),
    "latency/table.json": lambda text: text.replace("invented", "\udcff"),
    "plan.json": lambda text: text[:-5],
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(folder, tmp_path, capsys, file):
    shutil.copytree(folder, tmp_path / "runs")
    path = tmp_path / "runs" / file
    text = DAMAGED[file](path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    said = refused(capsys, str(tmp_path / "runs"))
    assert str(path) in said and ("again" in said or "anew" in said)
    assert not (tmp_path / "runs" / "report").exists()


def test_a_plan_of_another_version_is_one_line(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"knobs": 1}), encoding="utf-8")
    said = refused(capsys, str(tmp_path))
    assert str(tmp_path / "plan.json") in said and "knobs" in said


@pytest.mark.parametrize("quick", [True, False])
def test_the_title_says_whether_a_run_was_quick(tmp_path, quick):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"quick": quick}), encoding="utf-8")
    main([str(tmp_path)])
    for file in TEXTS:
        page = (tmp_path / file).read_text(encoding="utf-8")
        assert ("Visual-OPSD: invented numbers (quick run)" in page) is quick
        assert ("its numbers mean nothing" in page) is quick


def test_pages_of_the_microscope_are_copied_with_their_records_alone(folder, tmp_path, drawn):
    shutil.copytree(folder, tmp_path / "runs")
    later = tmp_path / "runs" / "microscope_opsd"
    later.mkdir()
    (later / "microscope.html").write_text("<p>after</p>", encoding="utf-8")
    (later / "microscope.json").write_text("[]", encoding="utf-8")
    (tmp_path / "runs" / "microscope" / "microscope.json").unlink()
    publish(tmp_path / "runs", tmp_path / "copy")
    copied = written(tmp_path / "copy")
    assert copied["microscope_opsd/microscope.html"] == b"<p>after</p>"
    assert "microscope/microscope.html" not in copied


def test_pictures_are_drawn_around_what_is_missing(folder, tmp_path):
    """One file of every kind less: figures are drawn, and say so."""
    shutil.copytree(folder, tmp_path / "less")
    lost = (
        "seed1/systems/thinkmorph-none/scores.json", "seed2/systems/sft/scores.json",
        "seed0/noise/validation.jsonl", "sweep/systems/jsd_beta-1/scores.json",
    )  # fmt: skip
    for file in lost:
        (tmp_path / "less" / file).unlink()
    file = "latency/table.json"
    write_file(tmp_path / "less", file, [r for r in FILES[file] if r["id"] != "sft, text-only"])
    file = "attention/attention.json"
    kept = [r for r in FILES[file] if not r["id"].startswith("noise/")]
    write_file(tmp_path / "less", file, kept)
    artefacts, _ = collect(tmp_path / "less")
    known = {p.name for a in artefacts for p in beside(a).values() if isinstance(p, Picture)}
    assert {"figure1a", "figure1c", "figure3a", "figure3b", "figure7b", "table6"} <= known
    assert "figure7a" not in known  # no bar of it was run
    for artefact in artefacts:
        for picture in beside(artefact).values():
            if isinstance(picture, Picture) and isinstance(picture.image, Figure):
                texts = [text.get_text() for axis in picture.image.axes for text in axis.texts]
                texts += [axis.get_title(loc="left") for axis in picture.image.axes]
                texts += [t.get_text() for leg in picture.image.legends for t in leg.get_texts()]
                texts += [text.get_text() for text in picture.image.texts]
                told = "not run" in " ".join(texts).lower()
                absent = picture.name in {
                    "figure1c", "figure3a", "figure3b", "figure7b", "table6",
                    "learning_accuracy", "learning_k_gen",
                }  # fmt: skip
                assert told == absent, picture.name
