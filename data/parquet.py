"""Random access to the rows of parquet shards, and iteration over a split in file order.

Row counts come from the file footers; rows are read one row group at a time, needed columns only.
Layout: `<root>/<Name>/data/*<split>*.parquet`, the split a word of the file name.
"""

import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.example import (
    ALL_FIELDS,
    IMAGE_COLUMN,
    PROBLEM_COLUMN,
    DataError,
    Example,
    ExampleError,
    Fields,
    check_complete,
    decode_example,
)
from data.streams import stream_seed

ROOT_VARIABLE = "VISUAL_OPSD_DATA_ROOT"
SPLITS = ("train", "validation", "test")
CACHE_BYTES = 256 << 20  # per source and process; the most recent row group always stays
OPEN_FILES = 8  # per source and process
MIN_JUDGED_ROWS = 200  # rows that are tried before the share of unusable ones is judged


def resolve_root(root: str | Path | None = None) -> Path:
    """Data root: the argument, else VISUAL_OPSD_DATA_ROOT of the environment, else datasets/."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or "datasets")


class ParquetSource:
    """Rows 0 .. len - 1 of one data set split, in sorted-file order.

    File handles are opened on first use in each process, so an instance may cross a fork or be
    pickled to a data-loader worker.
    """

    def __init__(
        self,
        root: str | Path | None,
        name: str,
        split: str = "train",
        fields: Fields = ALL_FIELDS,
        limit: int | None = None,
    ) -> None:
        """Find the files and read their footers.

        Args:
            fields: decides which columns are read.
            limit: use the first `limit` rows only.

        Raises:
            DataError: no file, no row, a damaged file, a required column is missing, or an image
                column is of another type.
        """
        self.name, self.fields = name, fields
        self.files = find_files(resolve_root(root), name, split)
        self.columns: list[tuple[str, ...]] = []  # per file
        groups, sizes, group_bytes = [], [], []  # per row group
        for index, file in enumerate(self.files):
            with _readable(file), pq.ParquetFile(file) as handle:
                self.columns.append(fields.columns(handle.schema_arrow.names, str(file)))
                _check_images(handle.schema_arrow, self.columns[-1], file)
                for group in range(handle.num_row_groups):
                    metadata = handle.metadata.row_group(group)
                    groups.append((index, group))
                    sizes.append(metadata.num_rows)
                    group_bytes.append(metadata.total_byte_size)
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.total_rows = int(self._starts[-1])
        if self.total_rows == 0:
            raise DataError(f"{name}: the files {_listed(self.files)} hold no rows")
        if limit is not None and limit < 1:
            raise DataError(f"{name}: limit={limit} must be at least 1")
        self._rows = min(self.total_rows, limit or self.total_rows)
        self.mean_group_bytes = float(np.mean(group_bytes))
        self._forget()

    def __len__(self) -> int:
        return self._rows

    @property
    def group_sizes(self) -> np.ndarray:
        """Rows used of each row group, in file order; sums to len(self)."""
        sizes = np.diff(np.minimum(self._starts, self._rows))
        return sizes[sizes > 0]

    def row(self, index: int) -> dict:
        """Undecoded row `index`: column name -> value, for the columns of its file."""
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self.name} with {self._rows} rows")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._table(group)
        return table.slice(index - int(self._starts[group]), 1).to_pylist()[0]

    def file_of(self, index: int) -> str:
        """Path of the file that holds row `index`."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return str(self.files[self._groups[group][0]])

    def example(self, index: int) -> Example:
        """Decoded row `index`.

        Raises:
            ExampleError: the row is damaged, or a field asked for is empty in it.
        """
        file = self.file_of(index)
        example = decode_example(self.row(index), self.name, index, self.fields, file)
        check_complete(example, self.fields, f"{file}, row {index} of {self.name}")
        return example

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pid": None, "_handles": OrderedDict(), "_cache": OrderedDict()}

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._handles: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def _table(self, group: int) -> pa.Table:
        if self._pid != os.getpid():
            self._forget()  # a forked child must not share file positions with its parent
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, local = self._groups[group]
        with _readable(self.files[file]):
            if file not in self._handles:
                if len(self._handles) >= OPEN_FILES:
                    self._handles.popitem(last=False)[1].close()
                self._handles[file] = pq.ParquetFile(self.files[file])
            # Arrow's threads do not survive a fork; one thread reads a row group fast enough.
            table = self._handles[file].read_row_group(
                local, columns=list(self.columns[file]), use_threads=False
            )
        self._cache[group] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table


class RowReader:
    """Reads rows of any source; unusable ones are counted, and too many of them stop the run."""

    def __init__(self, max_skip_fraction: float) -> None:
        self.max_skip_fraction = max_skip_fraction
        self.tried = 0
        self.skipped: Counter[str] = Counter()  # unusable rows by source
        self.last_error = ""  # of an unusable row

    def read(self, source: ParquetSource, row: int) -> Example | None:
        """Decoded row; None if it is unusable, for the caller to take another one.

        Raises:
            DataError: more than `max_skip_fraction` of the rows tried so far were unusable.
        """
        self.tried += 1
        try:
            return source.example(row)
        except ExampleError as error:
            self.skipped[source.name] += 1
            self.last_error = str(error)
            bad = self.skipped.total()
            if self.tried >= MIN_JUDGED_ROWS and bad > self.max_skip_fraction * self.tried:
                raise DataError(
                    f"{bad} of {self.tried} rows were unusable, more than "
                    f"max_skip_fraction={self.max_skip_fraction}; the last one: {error} "
                    "(or raise max_skip_fraction in the mixture file)"
                ) from error
            return None


def _check_images(schema: pa.Schema, columns: Sequence[str], file: Path) -> None:
    """Raise DataError if one of the columns is an image column of another type than images have."""
    for name in columns:
        kind = schema.field(name).type
        is_image = name.startswith((PROBLEM_COLUMN, IMAGE_COLUMN.format("")))
        if is_image and not _holds_images(kind):
            raise DataError(
                f"{file}: column {name} is of type {kind}; expected struct<bytes: binary, path: "
                "string> with PNG or JPEG data in bytes: write it so (docs/data.md)"
            )


def _holds_images(kind: pa.DataType) -> bool:
    """Whether it is a struct with binary `bytes`; what holds nulls only may be typed as null."""
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    data = kind.field("bytes").type
    return pa.types.is_binary(data) or pa.types.is_large_binary(data) or pa.types.is_null(data)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What Arrow says about a damaged file becomes a DataError that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file} is not a readable parquet file ({reason}); download or write it again"
        ) from error


def find_files(root: Path, name: str, split: str) -> list[Path]:
    """Sorted parquet files of one split.

    Raises:
        DataError: there is none; the message says where it looked and how to get data.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    folder = root / name / "data"
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])", re.IGNORECASE)
    present = sorted(folder.glob("*.parquet"))
    files = [file for file in present if word.search(file.stem)]
    if not files:
        raise DataError(
            f"no file matches {folder}/*{split}*.parquet (present: {_listed(present)}). Each data "
            "set has a folder of its name in the data root, with its files in data/; set "
            f"{ROOT_VARIABLE} or pass the data root if they lie elsewhere. INSTALL.md has the "
            "downloads, `python -m data.miniworld --output FOLDER` draws the miniature ones."
        )
    return files


def iter_examples(
    root: str | Path | None,
    names: Sequence[str],
    reader: RowReader,
    split: str = "train",
    limit_per_source: int | None = None,
    seed: int | None = None,
    fields: Fields = ALL_FIELDS,
) -> Iterator[Example]:
    """Examples of a split, source by source in file order. The next row replaces an unusable one.

    Args:
        reader: reads the rows; knows afterwards how many were unusable.
        limit_per_source: at most this many examples per source.
        seed: draw them at random without replacement (a stratified sample); None takes the first.

    Raises:
        DataError: see `ParquetSource` and `RowReader.read`.
    """
    for name in names:
        source = ParquetSource(root, name, split, fields)
        wanted = min(limit_per_source or len(source), len(source))
        order = np.arange(len(source))
        if seed is not None:
            order = permutation(stream_seed(seed, "data", "sample", name, split), len(source))
        # The sample itself is read in file order; spare rows follow in the order they were drawn.
        candidates = [*np.sort(order[:wanted]), *order[wanted:]]
        for row in candidates:
            if wanted == 0:
                break
            example = reader.read(source, int(row))
            if example is not None:
                wanted -= 1
                yield example


def permutation(seed: int, length: int) -> np.ndarray:
    """Keyed permutation of range(length), the same in every numpy version."""
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def _listed(files: Sequence[Path]) -> str:
    names = [file.name for file in files[:5]]
    return ", ".join(names) + (", ..." if len(files) > 5 else "") if names else "none"
