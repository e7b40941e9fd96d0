"""The committed report and ledger are what the committed result files give, and nothing else."""

from pathlib import Path

import pytest

from eval.artefacts.markdown import COMPLETE, status
from eval.report import REPORT, collect, ledger_page, report

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path("results/mini/reproduction")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The report of a copy of the committed files, without the committed report."""
    copy = tmp_path_factory.mktemp("published") / "reproduction"
    for file in (ROOT / PUBLISHED).rglob("*"):
        relative = file.relative_to(ROOT / PUBLISHED)
        if file.is_file() and relative.parts[0] != REPORT:
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            (copy / relative).write_bytes(file.read_bytes())
    report(copy)
    return copy / REPORT


def test_tables_and_text_are_those_of_the_files(made):
    there = ROOT / PUBLISHED / REPORT
    for pattern in ("report.md", "tables/*.csv"):
        names = {file.relative_to(made) for file in made.glob(pattern)}
        assert names == {file.relative_to(there) for file in there.glob(pattern)}
        for name in names:
            assert (made / name).read_text() == (there / name).read_text(), name
    # pixels depend on versions of libraries; which pictures there are does not
    assert {f.name for f in made.glob("figures/*")} == {f.name for f in there.glob("figures/*")}
    assert (there / "report.html").is_file()


def test_every_artefact_was_run_from_clean_commits():
    artefacts, results = collect(ROOT / PUBLISHED)
    assert {status(artefact) for artefact in artefacts} == {COMPLETE}
    files = [file for file in results.read if file.endswith(("json", "jsonl"))]
    records = [
        record for file in files if "metrics" not in file for record in results.records(file)
    ]
    assert len(records) > 500
    assert not [record["command"] for record in records if "dirty" in record["commit"]]


def test_the_ledger_is_that_of_the_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs" / "results.md").read_text() == ledger_page(PUBLISHED)
