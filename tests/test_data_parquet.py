"""Parquet sources: random access, column projection, counts without data, sampling."""

import multiprocessing
import pickle

import pyarrow.parquet as pq
import pytest

from data.example import ALL_FIELDS, QUESTION_FIELDS, DataError, ExampleError, Fields
from data.parquet import ParquetSource, iter_examples, permutation, resolve_root
from tests.data_helpers import cell, record, write_source


@pytest.fixture
def reads(monkeypatch):
    """Every row group read: (row group, columns)."""
    seen = []
    original = pq.ParquetFile.read_row_group

    def recorded(self, i, columns=None, **kwargs):
        seen.append((i, tuple(columns)))
        return original(self, i, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    return seen


@pytest.fixture
def root(tmp_path):
    write_source(tmp_path, "Toy", [record(i) for i in range(22)], files=3)
    return tmp_path


def test_rows_keep_sorted_file_order(root):
    source = ParquetSource(root, "Toy")
    assert len(source) == 22
    for index in (21, 0, 7, 8, 15, 16, 3):
        assert source.row(index)["pid"] == f"p{index}"
    with pytest.raises(IndexError, match="row 22 of Toy"):
        source.row(22)


def test_counts_come_from_metadata(root, reads):
    source = ParquetSource(root, "Toy", limit=10)
    assert (len(source), source.total_rows) == (10, 22)
    assert source.group_sizes.tolist() == [4, 4, 2]
    assert reads == []


def test_only_needed_columns_are_read(root, reads):
    source = ParquetSource(root, "Toy", fields=Fields(thoughts=False, full_text_only_thought=False))
    expected = {"problem_image_0", "question", "answer", "reasoning_image_0", "pid", "task"}
    assert set(source.row(9)) == expected
    assert [(group, set(columns)) for group, columns in reads] == [(0, expected)]
    assert "reasoning_image_0" not in ParquetSource(root, "Toy", fields=QUESTION_FIELDS).row(0)


def test_a_row_group_is_read_once_while_cached(root, reads):
    source = ParquetSource(root, "Toy")
    for index in (0, 3, 1, 4, 2, 5):
        source.row(index)
    assert [group for group, _ in reads] == [0, 1]


def test_cache_is_bounded_by_bytes(root, reads, monkeypatch):
    monkeypatch.setattr("data.parquet.CACHE_BYTES", 1)
    source = ParquetSource(root, "Toy")
    for index in (0, 4, 0):
        source.row(index)
    assert [group for group, _ in reads] == [0, 1, 0]
    assert len(source._cache) == 1


def test_splits_are_words_of_the_file_name(root):
    write_source(root, "Toy", [record(100)], split="test")
    write_source(root, "Toy", [record(101)], split="latest-constrained")
    assert [file.name[:5] for file in ParquetSource(root, "Toy", "train").files] == ["train"] * 3
    assert ParquetSource(root, "Toy", "test").row(0)["pid"] == "p100"
    with pytest.raises(DataError, match="split 'dev' is not one of"):
        ParquetSource(root, "Toy", "dev")


def test_no_files_says_where_it_looked_and_what_to_do(tmp_path, root):
    with pytest.raises(DataError, match=r"Nope/data/\*train\*\.parquet.*VISUAL_OPSD_DATA_ROOT"):
        ParquetSource(tmp_path, "Nope")
    with pytest.raises(DataError, match="present: train-00000.*download_model"):
        ParquetSource(root, "Toy", "validation")


def test_missing_column_names_file_and_columns(tmp_path):
    rows = [record(i, reasoning_image_0=...) for i in range(3)]
    write_source(tmp_path, "Toy", rows)
    with pytest.raises(
        DataError, match=r"train-00000.*missing column\(s\) reasoning_image_0; .*pid"
    ):
        ParquetSource(tmp_path, "Toy")
    assert len(ParquetSource(tmp_path, "Toy", fields=QUESTION_FIELDS)) == 3


def test_empty_files_are_an_error(tmp_path):
    write_source(tmp_path, "Toy", [record(0)])
    file = tmp_path / "Toy/data/train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(DataError, match="Toy: the files .* hold no rows"):
        ParquetSource(tmp_path, "Toy")


def test_columns_may_differ_between_files(tmp_path):
    write_source(tmp_path, "Toy", [record(0)], split="train-a")
    write_source(tmp_path, "Toy", [record(1, pid=..., task=...)], split="train-b")
    source = ParquetSource(tmp_path, "Toy")
    assert [source.example(i).key for i in range(2)] == ["Toy/p0", "Toy/1"]


def test_data_root_precedence(monkeypatch, tmp_path):
    monkeypatch.delenv("VISUAL_OPSD_DATA_ROOT", raising=False)
    assert str(resolve_root()) == "datasets"
    monkeypatch.setenv("VISUAL_OPSD_DATA_ROOT", "/elsewhere")
    assert str(resolve_root()) == "/elsewhere"
    assert resolve_root(tmp_path) == tmp_path


def test_pickled_and_forked_sources_open_their_own_files(root):
    source = ParquetSource(root, "Toy")
    source.row(0)
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy._handles), len(copy._cache)) == (0, 0)
    assert copy.row(20) == source.row(20)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(source.row, (5,))["pid"] == "p5"


def test_iter_examples_in_file_order(root):
    write_source(root, "Other", [record(i) for i in range(5)])
    keys = [e.key for e in iter_examples(root, ["Toy", "Other"], limit_per_source=3)]
    assert keys == ["Toy/p0", "Toy/p1", "Toy/p2", "Other/p0", "Other/p1", "Other/p2"]
    assert len(list(iter_examples(root, ["Other"]))) == 5


def test_seeded_sample_is_stratified_and_without_replacement(root):
    write_source(root, "Other", [record(i) for i in range(9)])

    def sample(seed):
        names = ["Toy", "Other"]
        return [e.key for e in iter_examples(root, names, limit_per_source=6, seed=seed)]

    keys = sample(1)
    assert len(set(keys)) == 12
    assert [key.split("/")[0] for key in keys] == ["Toy"] * 6 + ["Other"] * 6
    assert keys == sample(1) != sample(2)
    assert keys != sample(None)


def test_unusable_rows_are_reported_and_replaced(tmp_path):
    rows = [record(i) for i in range(6)]
    rows[1]["problem_image_0"] = cell(b"junk")
    rows[2]["reasoning_image_0"] = cell(None)
    write_source(tmp_path, "Toy", rows)
    with pytest.raises(ExampleError, match="row 1 of Toy"):
        list(iter_examples(tmp_path, ["Toy"]))
    errors = []
    found = iter_examples(tmp_path, ["Toy"], limit_per_source=3, on_error=errors.append)
    assert [example.pid for example in found] == ["p0", "p3", "p4"]
    assert len(errors) == 2
    lenient = iter_examples(tmp_path, ["Toy"], fields=QUESTION_FIELDS, on_error=errors.append)
    assert [example.pid for example in lenient] == ["p0", "p2", "p3", "p4", "p5"]


def test_permutation_is_pinned():
    assert permutation(3, 8).tolist() == [0, 4, 7, 1, 5, 6, 3, 2]
    assert sorted(permutation(4, 100)) == list(range(100))


def test_all_fields_is_the_default(root):
    assert ParquetSource(root, "Toy").fields == ALL_FIELDS
