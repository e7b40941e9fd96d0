"""Benchmarks by name: the registry, versions of files, data sets in the training schema."""

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.example import DataError, decode_image
from data.miniworld.world import TASKS
from data.miniworld.write import write_shards
from eval.benchmarks import BENCHMARKS, PAPER, benchmark_root, open_benchmark, resolve
from eval.files import registry
from eval.files.originals import LAYOUTS
from eval.files.registry import COLUMNS
from eval.protocol import PromptStyle
from tests.benchmark_files import VSP, maze, opened, pixels, row, tsv
from tests.data_helpers import cell, noisy_png, png, record, write_source
from train.config import UsageError

# --- the registry ---------------------------------------------------------------------------------


def test_eleven_files_make_nine_columns():
    assert list(COLUMNS) == [
        "VSP", "VisPuzzle", "ChartQA", "VStar", "BLINK-J", "MMVP", "SAT", "BLINK", "CV-Bench",
    ]  # fmt: skip
    assert [name for names in COLUMNS.values() for name in names] == list(PAPER)
    assert COLUMNS["ChartQA"] == ("ChartQA_h_bar", "ChartQA_v_bar")
    assert COLUMNS["CV-Bench"] == ("CV-Bench-2D", "CV-Bench-3D")
    assert all(BENCHMARKS[task].column == task for task in TASKS)
    assert len(PAPER) == 11 and set(BENCHMARKS) == {*PAPER, *TASKS}
    pinned = [BENCHMARKS[name].md5 for name in PAPER]
    assert len(set(pinned)) == 11 and all(int(md5, 16) and len(md5) == 32 for md5 in pinned)
    assert set(LAYOUTS) == set(PAPER)


def test_names_resolve_in_order_and_once(tmp_path):
    write_source(tmp_path, "My_Set", [record(0)], split="test")
    assert resolve(["paper"], tmp_path) == list(PAPER)
    assert resolve(["MINI"], tmp_path) == list(TASKS)
    assert resolve(["v*", "blink-j", "BLINK", "vsp", "VStarBench"], tmp_path) == [
        "VStarBench", "BLINK_Jigsaw", "BLINK", VSP,
    ]  # fmt: skip
    assert resolve(["chartqa", "cvbench3d", "CV-Bench"], tmp_path) == [
        "ChartQA_h_bar", "ChartQA_v_bar", "CV-Bench-3D", "CV-Bench-2D",
    ]  # fmt: skip
    assert resolve(["sat", "my_set"], tmp_path) == ["SAT_circular", "My_Set"]
    for name in BENCHMARKS:
        assert resolve([name.lower()], tmp_path) == [name]
    for column, names in COLUMNS.items():
        assert resolve([column, column.upper()], tmp_path) == list(names)
    assert resolve(["V*"], tmp_path) == resolve(["vstar"], tmp_path) == ["VStarBench"]
    assert resolve(["VSP-in"], tmp_path) == [VSP]


def test_folders_that_differ_in_case_alone_are_told_apart(tmp_path):
    for name in ("my-set", "My_Set", "BLINK"):
        write_source(tmp_path, name, [record(0)], split="test")
    assert resolve(["my-set", "My_Set", "blink"], tmp_path) == ["my-set", "My_Set", "BLINK"]
    with pytest.raises(UsageError, match="BLINK is not in"):  # not that of the data root
        opened(tmp_path / "files", "BLINK", data_root=tmp_path)
    with pytest.raises(UsageError, match="open ChartQA_h_bar and ChartQA_v_bar one by one"):
        opened(tmp_path, "ChartQA")


def test_an_unknown_name_lists_what_there_is(tmp_path):
    write_source(tmp_path, "My_Set", [record(0)], split="test")
    with pytest.raises(UsageError, match=r"BLIMK: there is VSP_maze.*CV-Bench-3D.*paper.*My_Set"):
        resolve(["BLINK", "BLIMK"], tmp_path)
    with pytest.raises(UsageError, match="no others"):
        opened(tmp_path, "My_Sets", data_root=tmp_path / "nowhere")


def test_the_root_is_the_argument_or_the_variable_or_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("LMUData", raising=False)
    assert str(benchmark_root()) == "/home/somebody/LMUData"
    monkeypatch.setenv("LMUData", "/elsewhere")
    assert str(benchmark_root()) == "/elsewhere"
    assert benchmark_root(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", PAPER)
def test_a_missing_file_says_where_to_get_it_and_where_to_put_it(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, name)
    message, benchmark = str(caught.value), BENCHMARKS[name]
    for part in (f"put {name}.tsv there", str(tmp_path), benchmark.tsv, benchmark.original):
        assert part in message
    assert "\n" not in message and str(tmp_path / benchmark.folders[0]) in message


def test_a_folder_without_its_table_is_named(tmp_path):
    (tmp_path / "BLINK").mkdir()
    pq.write_table(pa.table({"idx": [1]}), tmp_path / "BLINK/test-00000.parquet")
    with pytest.raises(UsageError, match=r"BLINK has no \*\.parquet of the split val"):
        opened(tmp_path, "BLINK")


def test_limit_has_to_be_positive(tmp_path):
    with pytest.raises(UsageError, match="--limit must be at least 1, got 0"):
        opened(tmp_path, "BLINK", limit=0)


# --- versions and hashes --------------------------------------------------------------------------


def test_hashes_are_those_of_the_file(tmp_path):
    file = tsv(tmp_path, "VisPuzzle", [row(1)])
    dataset = opened(tmp_path, "VisPuzzle")
    assert dataset.file == str(file)
    assert dataset.file_hash == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    found = hashlib.md5(file.read_bytes()).hexdigest()
    assert dataset.label_version == f"unknown file (md5 {found})"


def test_label_versions_of_blink(tmp_path, monkeypatch):
    rows = [row(1, category="Relative_Reflectance"), row(2, category="Counting")]
    md5 = hashlib.md5(tsv(tmp_path, "BLINK", rows).read_bytes()).hexdigest()
    dataset = opened(tmp_path, "BLINK")
    assert dataset.label_version == f"unknown file (md5 {md5})"
    assert any("Relative_Reflectance may be the old ones" in text for text in dataset.notices)
    assert [sample.flaw for sample in dataset] == [
        "this may be a label of the old file, in which about 90 % of this task are wrong", "",
    ]  # fmt: skip

    pinned = dataclasses.replace(BENCHMARKS["BLINK"], md5=md5)
    monkeypatch.setitem(BENCHMARKS, "BLINK", pinned)
    dataset = opened(tmp_path, "BLINK")
    assert dataset.label_version == f"as pinned in the harness (md5 {md5})"
    assert any("Relative_Reflectance are the old ones" in text for text in dataset.notices)
    assert [sample.flaw for sample in dataset] == [
        "a label of the old file; about 90 % of this task are wrong in it", "",
    ]  # fmt: skip

    monkeypatch.undo()
    monkeypatch.setattr(registry, "CORRECTED_BLINK", md5)
    dataset = opened(tmp_path, "BLINK")
    assert dataset.label_version == f"corrected 2026-05-11 (md5 {md5})"
    assert not any("Reflectance" in text for text in dataset.notices)
    assert [sample.flaw for sample in dataset] == ["", ""]


def test_the_published_versions_of_blink_are_known():
    assert BENCHMARKS["BLINK"].md5 == "3b6649b6a662184ea046908e5506260e"
    assert registry.CORRECTED_BLINK == "d5e8af148b10ac69f535ff7b23f3f989"


def test_row_counts_are_compared_with_what_is_expected(tmp_path):
    tsv(tmp_path, "BLINK_Jigsaw", [row(0), *(row(k, image="0") for k in range(1, 150))])
    assert opened(tmp_path, "BLINK-J").notices == []
    tsv(tmp_path, "VSP_maze_task_main_original", [maze(1, "<TEST-IMAGE>")])
    assert opened(tmp_path, "VSP").notices == [
        "1 questions, 600 are expected (the paper says 120 for VSP)"
    ]
    tsv(tmp_path, "ChartQA_h_bar", [row(1)])
    assert opened(tmp_path, "ChartQA_h_bar").notices == [
        "1 questions; the paper says 944 for ChartQA"
    ]


# --- the schema of the training data --------------------------------------------------------------


def test_a_training_data_set_is_asked_as_it_was_trained(tmp_path):
    rows = [record(k) for k in range(9)]
    rows[2]["problem_image_0"] = cell(noisy_png()[:1500])
    rows[5]["answer"] = " "
    write_source(tmp_path, "Visual_Search", rows, files=2, split="test")
    dataset = opened(tmp_path, "visual_search", data_root=tmp_path, style=PromptStyle())
    assert dataset.ids == ["p0", "p1", "p3", "p4", "p6", "p7", "p8"]
    assert dataset.name == "Visual_Search"
    assert dataset.label_version == "training schema, split test" and len(dataset.file_hash) == 12
    (notice,) = dataset.notices
    assert dataset.left_out == 2
    assert notice.startswith("2 of 9 rows are left out as unusable: row p2 (its picture is damaged")
    sample = dataset[2]
    assert sample.prompt[1:] == ("question 3?",) and sample.question.rule == "match"
    assert (sample.id, sample.question.gold, sample.category) == ("p3", "B", "toy")
    np.testing.assert_array_equal(pixels(sample.images[0]), pixels(decode_image(png(3))))
    assert sample.example.pid == "p3" and sample.example.thoughts == ("first 3", "second 3")
    np.testing.assert_array_equal(
        pixels(sample.example.visual_thoughts[0]), pixels(decode_image(png(1003)))
    )
    assert opened(tmp_path, "Visual_Search", data_root=tmp_path, limit=3).ids == ["p0", "p1", "p3"]


def test_a_set_of_ones_own_needs_no_visual_thoughts(tmp_path):
    names = {"reasoning_image_0": ..., "full_text_only_thought": ..., "pid": ..., "task": ...}
    rows = [record(k, **names) for k in range(3)]
    write_source(tmp_path, "My_Set", rows, split="validation")
    dataset = opened(tmp_path, "My_Set", data_root=tmp_path, split="validation")
    assert (dataset.ids, dataset.name, dataset.notices) == (["0", "1", "2"], "My_Set", [])
    assert dataset[2].question.gold == "A" and dataset[2].example.visual_thoughts == ()
    with pytest.raises(DataError, match=r"no file matches .*My_Set/data/\*test\*\.parquet"):
        opened(tmp_path, "My_Set", data_root=tmp_path)


def test_training_data_that_cannot_be_used(tmp_path):
    write_source(tmp_path, "Twice", [record(1), record(2), record(1)], split="test")
    with pytest.raises(DataError, match="id 'p1' occurs more than once"):
        opened(tmp_path, "Twice", data_root=tmp_path)
    write_source(tmp_path, "Empty", [record(1, answer="")], split="test")
    with pytest.raises(DataError, match="none of 1 rows can be used: row p1: its answer is empty"):
        opened(tmp_path, "Empty", data_root=tmp_path)


def test_a_miniature_task_that_is_not_there_says_how_to_draw_it(tmp_path):
    with pytest.raises(DataError, match=r"Jigsaw_Assembly/data/\*test\*.*data\.miniworld"):
        opened(tmp_path, "Jigsaw_Assembly", data_root=tmp_path)


def test_beside_each_row_of_a_training_set_stands_another(tmp_path):
    write_shards(tmp_path / TASKS[0] / "data", TASKS[0], "test", 3, seed=0, shards=range(1))
    dataset = open_benchmark(
        TASKS[0], root=tmp_path, data_root=tmp_path, style=PromptStyle(), split="test", limit=2
    )
    samples = [dataset[number] for number in range(2)]
    assert [sample.other().pid for sample in samples] == [samples[1].id, samples[0].id]
    assert samples[0].other().visual_thoughts[0].tobytes() == (
        samples[1].example.visual_thoughts[0].tobytes()
    )


BROKEN = cell(noisy_png()[:1500])


def others_of(root, rows, limit=None):
    """Per row that is asked, the one whose visual thoughts may stand in for its own."""
    write_source(root, "Toys", rows, split="test")
    dataset = opened(root, "Toys", data_root=root, limit=limit)
    return [sample.other for sample in dataset]


def test_a_row_without_visual_thoughts_does_not_stand_in_for_another(tmp_path):
    rows = [record(k) for k in range(6)]
    for number in (1, 2, 5):
        rows[number]["reasoning_image_0"] = BROKEN if number < 5 else cell(None)
    found = [other() for other in others_of(tmp_path, rows)]
    assert [other.pid for other in found] == ["p3", "p0", "p0", "p0", "p3", "p4"]
    for other in found:
        picture = decode_image(png(1000 + int(other.pid[1:])))
        np.testing.assert_array_equal(pixels(other.visual_thoughts[0]), pixels(picture))
    rows[0]["reasoning_image_0"] = cell(None)
    found = [other().pid for other in others_of(tmp_path, rows)]
    assert found == ["p3", "p4", "p4", "p4", "p3", "p4"]  # round from the first to the last
    first = others_of(tmp_path, rows, limit=1)
    assert [other().pid for other in first] == ["p3"]  # also among rows that are not asked


def test_a_row_that_cannot_be_decoded_is_passed_over(tmp_path, monkeypatch):
    """Its bytes look whole, and its pixels are not: found out when it is read."""
    monkeypatch.setattr("eval.benchmarks.damage", lambda data: "")
    rows = [record(k) for k in range(4)]
    rows[1]["problem_image_0"] = BROKEN
    found = [other().pid for other in others_of(tmp_path, rows[:1] + rows[2:])]
    assert found == ["p2", "p0", "p2"]
    write_source(tmp_path, "Toys", rows, split="test")
    dataset = opened(tmp_path, "Toys", data_root=tmp_path)
    assert [dataset[number].other().pid for number in (0, 2, 3)] == ["p2", "p0", "p2"]


def test_only_where_no_other_row_has_any_that_is_an_error(tmp_path):
    rows = [record(0), *(record(k, reasoning_image_0=BROKEN) for k in (1, 2))]
    other, *rest = others_of(tmp_path, rows)
    assert [read().pid for read in rest] == ["p0", "p0"]
    words = "Toys, row p0: .* none of the 2 other rows has any; add rows that have some, or leave"
    with pytest.raises(DataError, match=words):
        other()
    (alone,) = others_of(tmp_path, rows[:1])
    with pytest.raises(DataError, match="row p0: .*there is no other row; add rows"):
        alone()
