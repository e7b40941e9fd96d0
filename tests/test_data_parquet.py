"""Parquet sources: random access, column projection, counts without data, sampling."""

import multiprocessing
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.example import ALL_FIELDS, DataError, Fields
from data.parquet import ParquetSource, RowReader, iter_examples, permutation, resolve_root
from tests.data_helpers import cell, png, record, write_source

QUESTION_FIELDS = Fields(visual_thoughts=False, thoughts=False, full_text_only_thought=False)


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
    with pytest.raises(DataError, match="present: train-00000.*INSTALL.md has the downloads"):
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
    reader = RowReader(0.0)
    keys = [e.key for e in iter_examples(root, ["Toy", "Other"], reader, limit_per_source=3)]
    assert keys == ["Toy/p0", "Toy/p1", "Toy/p2", "Other/p0", "Other/p1", "Other/p2"]
    assert len(list(iter_examples(root, ["Other"], reader))) == 5
    assert (reader.tried, reader.skipped.total()) == (11, 0)


def test_seeded_sample_is_stratified_and_without_replacement(root):
    write_source(root, "Other", [record(i) for i in range(9)])

    def sample(seed):
        names, reader = ["Toy", "Other"], RowReader(0.0)
        return [e.key for e in iter_examples(root, names, reader, limit_per_source=6, seed=seed)]

    keys = sample(1)
    assert len(set(keys)) == 12
    assert [key.split("/")[0] for key in keys] == ["Toy"] * 6 + ["Other"] * 6
    assert keys == sample(1) != sample(2)
    assert keys != sample(None)


def test_unusable_rows_are_counted_and_replaced(tmp_path):
    rows = [record(i) for i in range(6)]
    rows[1]["problem_image_0"] = cell(b"junk")
    rows[2]["reasoning_image_0"] = cell(None)
    write_source(tmp_path, "Toy", rows)
    write_source(tmp_path, "Other", rows[:2])
    reader = RowReader(0.0)
    found = iter_examples(tmp_path, ["Toy", "Other"], reader, limit_per_source=3)
    assert [example.key for example in found] == ["Toy/p0", "Toy/p3", "Toy/p4", "Other/p0"]
    assert reader.skipped == {"Toy": 2, "Other": 1} and reader.tried == 7
    assert "row 1 of Other" in reader.last_error
    lenient = iter_examples(tmp_path, ["Toy"], reader, fields=QUESTION_FIELDS)
    assert [example.pid for example in lenient] == ["p0", "p2", "p3", "p4", "p5"]
    assert reader.skipped["Toy"] == 3


def test_the_share_of_unusable_rows_is_judged_from_200_rows_on(tmp_path):
    rows = [record(i) for i in range(210)]
    for row in (0, 1, 2, 205):
        rows[row]["problem_image_0"] = cell(b"junk")
    write_source(tmp_path, "Toy", rows)
    assert len(list(iter_examples(tmp_path, ["Toy"], RowReader(0.02)))) == 206
    reader = RowReader(0.019)
    with pytest.raises(DataError, match=r"4 of 206 rows were unusable.*row 205 of Toy"):
        list(iter_examples(tmp_path, ["Toy"], reader))
    assert reader.tried == 206


@pytest.mark.parametrize(
    ("column", "kind", "value", "usable"),
    [
        ("problem_image_0", pa.binary(), png(1), False),
        ("reasoning_image_0", pa.binary(), png(1), False),
        ("reasoning_image_1", pa.string(), "maze.png", False),
        ("problem_image_0", pa.struct([("path", pa.string())]), {"path": "maze.png"}, False),
        ("problem_image_0", pa.struct([("bytes", pa.string())]), {"bytes": "maze.png"}, False),
        ("problem_image_0", pa.list_(pa.uint8()), [1, 2], False),
        ("problem_image_0", pa.struct([("bytes", pa.large_binary())]), {"bytes": png(1)}, True),
        ("reasoning_image_1", pa.null(), None, True),
        ("reasoning_image_1", pa.struct([("bytes", pa.null())]), None, True),
    ],
)
def test_image_columns_of_another_type_are_named(tmp_path, column, kind, value, usable):
    row = {**record(0), column: value}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: image if "_image_" in name else pa.string() for name in row} | {column: kind}
    file = tmp_path / "Toy" / "data" / "train-00000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row], pa.schema(list(types.items()))), file)
    if usable:
        assert len(ParquetSource(tmp_path, "Toy").example(0).visual_thoughts) == 1
        return
    with pytest.raises(DataError) as caught:
        ParquetSource(tmp_path, "Toy")
    message = str(caught.value)
    found = pq.read_schema(file).field(column).type
    assert f"{file}: column {column} is of type {found}; expected struct<bytes: binary" in message
    if column != "problem_image_0":
        assert len(ParquetSource(tmp_path, "Toy", fields=QUESTION_FIELDS)) == 1  # it is not read


def test_permutation_is_pinned():
    assert permutation(3, 8).tolist() == [0, 4, 7, 1, 5, 6, 3, 2]
    assert sorted(permutation(4, 100)) == list(range(100))


def test_all_fields_is_the_default(root):
    assert ParquetSource(root, "Toy").fields == ALL_FIELDS
