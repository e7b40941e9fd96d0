"""Weighted mixture of parquet sources in an order that depends on the seed alone.

`Mixture.draw(i)` is a pure function of the global draw index i: data-loader workers, ranks and a
resumed run all see the same sequence. In one epoch of a source every row comes exactly once.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import DataLoader, Dataset

from data.example import MAX_ROUNDS, DataError, Example, Fields
from data.order import EpochOrder, Schedule
from data.parquet import SPLITS, ParquetSource, RowReader
from data.processor import transform_from_dict
from data.streams import stream_seed
from data.transforms import ImageTransform

GROUPS = ("visual_opsd", "text_reasoning", "interleaved_reasoning")
INTERLEAVED = "interleaved"  # text and pictures in turn: rows that draw
CONTEXTS = ("student", "teacher", "teacher_noise", INTERLEAVED)


@dataclass(frozen=True)
class MixtureConfig:
    """One group of a mixture file; the fields below `group` are its keys."""

    group: str  # top-level key: visual_opsd needs visual thoughts, text_reasoning needs their text,
    # interleaved_reasoning both in turn
    dataset_names: tuple[str, ...]  # folders under the data root
    num_used_data: tuple[int, ...] | None = None  # first rows of each source in file order
    weights: tuple[float, ...] | None = None  # per source; default: in proportion to the rows used
    split: str = "train"
    max_reference_rounds: int = MAX_ROUNDS  # visual thoughts used of each row
    vit_image_transform_args: ImageTransform | None = None  # default: what the checkpoint says
    contexts: Mapping[str, Mapping[str, float]] | None = None  # source or "default" -> shares
    max_skip_fraction: float = 0.01  # of rows tried, above it the run stops

    def __post_init__(self) -> None:
        for key, (fits, expected) in _SHAPES.items():
            value = getattr(self, key)
            if value is not None and not fits(value):
                shown = list(value) if isinstance(value, tuple) else value
                raise DataError(f"{self.group}: {key} is {shown!r}; expected {expected}")
        names = self.dataset_names
        if not names or len(set(names)) != len(names):
            raise DataError(f"{self.group}: dataset_names {list(names)} is empty or has repeats")
        for key in ("num_used_data", "weights"):
            values = getattr(self, key)
            if values is not None and (len(values) != len(names) or min(values) <= 0):
                raise DataError(
                    f"{self.group}: {key} {list(values)} needs one positive number for each of "
                    f"{', '.join(names)}"
                )
        if self.split not in SPLITS:
            raise DataError(f"{self.group}: split {self.split!r} is not one of {', '.join(SPLITS)}")
        if self.max_reference_rounds < 1 or not 0 <= self.max_skip_fraction < 1:
            raise DataError(
                f"{self.group}: need max_reference_rounds >= 1 and 0 <= max_skip_fraction < 1, got "
                f"{self.max_reference_rounds} and {self.max_skip_fraction}"
            )
        for source, shares in (self.contexts or {}).items():
            _check_contexts(self.group, source, shares, names)
        if self.max_reference_rounds < MAX_ROUNDS and self.draws_pictures():
            raise DataError(
                f"{self.group}: max_reference_rounds {self.max_reference_rounds} would cut "
                f"interleaved rows in mid-thought: leave it out"
            )

    @classmethod
    def load(cls, path: str | Path) -> "MixtureConfig":
        """Read a mixture file.

        Raises:
            DataError: no such file, no yaml, unknown keys (the message lists the known ones) or
                values that do not fit.
        """
        tree = _read_yaml(Path(path))
        if not isinstance(tree, dict) or len(tree) != 1 or next(iter(tree)) not in GROUPS:
            found = list(tree) if isinstance(tree, dict) else tree
            raise DataError(
                f"{path}: expected one top-level key out of {', '.join(GROUPS)}, found {found!r}"
            )
        group, values = next(iter(tree.items()))
        known = [f.name for f in dataclasses.fields(cls) if f.name != "group"]
        if not isinstance(values, dict) or values.get("dataset_names") is None:
            raise DataError(f"{path}: {group} needs dataset_names; keys are {', '.join(known)}")
        unknown = [key for key in values if key not in known]
        if unknown:
            raise DataError(
                f"{path}: unknown keys {unknown} in {group}; known keys are {', '.join(known)}"
            )
        values = {key: value for key, value in values.items() if value is not None}
        for key in ("dataset_names", "num_used_data", "weights"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        if "vit_image_transform_args" in values:
            values["vit_image_transform_args"] = transform_from_dict(
                values["vit_image_transform_args"], f"{path}: vit_image_transform_args"
            )
        try:
            return cls(group=group, **values)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @property
    def fields(self) -> Fields:
        """What has to be read: visual thoughts for a teacher, text reasoning for SFT, thoughts
        around visual thoughts for interleaved rows.
        """
        used = self._used_contexts()
        return Fields(
            visual_thoughts=self.group == "visual_opsd" or bool(used - {"student"}),
            thoughts=INTERLEAVED in used,
            interleaved=INTERLEAVED in used,
            full_text_only_thought=self.group != "visual_opsd" and bool(used - {INTERLEAVED}),
            max_rounds=self.max_reference_rounds,
        )

    @property
    def default_context(self) -> str:
        """Of rows whose source `contexts` does not name."""
        return INTERLEAVED if self.group == "interleaved_reasoning" else "student"

    def draws_pictures(self) -> bool:
        """Whether there are rows of the interleaved context."""
        return INTERLEAVED in self._used_contexts()

    def _used_contexts(self) -> set[str]:
        shares = self.contexts or {}
        used = {name for share in shares.values() for name, part in share.items() if part}
        if "default" not in shares and set(self.dataset_names) - set(shares):
            used.add(self.default_context)
        return used


@dataclass(frozen=True)
class Drawn:
    """One draw of a mixture."""

    example: Example
    index: int  # global draw index
    row: int  # row of the source the example comes from
    epoch: int  # of the source
    skipped: int = 0  # unusable rows passed over in this draw
    context: str = "student"  # sft: which context the completion follows


class Mixture:
    """Sources, their weights and the order of draws. Memory does not grow with the data."""

    def __init__(
        self,
        config: MixtureConfig,
        root: str | Path | None = None,
        seed: int = 0,
        fields: Fields | None = None,
    ) -> None:
        self.config, self.seed = config, seed
        limits = config.num_used_data or (None,) * len(config.dataset_names)
        self.sources = [
            ParquetSource(root, name, config.split, fields or config.fields, limit)
            for name, limit in zip(config.dataset_names, limits, strict=True)
        ]
        self._schedule = Schedule(self.sources, config.weights, seed)
        self._orders = [EpochOrder(source, seed) for source in self.sources]
        self._reader = RowReader(config.max_skip_fraction)

    def draw(self, index: int) -> Drawn:
        """Example of the global draw `index` (0, 1, ...).

        An unusable row is passed over for the next row of its source in file order.

        Raises:
            DataError: this process skipped more than `max_skip_fraction` of the rows it tried.
        """
        which, position = self._schedule.place(index)
        source = self.sources[which]
        epoch, row = self._orders[which].row(position)
        for skipped in range(len(source)):
            candidate = (row + skipped) % len(source)
            example = self._reader.read(source, candidate)
            if example is not None:
                context = self._context(which, index)
                return Drawn(example, index, candidate, epoch, skipped, context)
        raise DataError(f"{source.name}: none of its {len(source)} rows is usable")

    def _context(self, which: int, index: int) -> str:
        contexts = self.config.contexts or {}
        name = self.sources[which].name
        shares = contexts.get(name, contexts.get("default"))
        if shares is None:
            return self.config.default_context
        draw = stream_seed(self.seed, "context", index) / 2**63 * sum(shares.values())
        bounds = list(accumulate(shares.values()))
        return list(shares)[min(bisect_right(bounds, draw), len(bounds) - 1)]


def load_mixture(
    path: str | Path,
    root: str | Path | None = None,
    seed: int = 0,
    fields: Fields | None = None,
) -> Mixture:
    """Mixture from a file of `data/configs/`.

    Args:
        root: data root; None asks VISUAL_OPSD_DATA_ROOT, then datasets/.
        seed: of the order and of the choice of contexts.
        fields: what to read; None reads what the group of the file needs.
    """
    return Mixture(MixtureConfig.load(path), root, seed, fields)


class MixtureDataset(Dataset):
    """Step -> the rows of one rank: [(global_row, Drawn), ...], rows contiguous per rank."""

    def __init__(self, mixture: Mixture, global_batch: int, rank: int = 0, world: int = 1) -> None:
        if global_batch < 1 or global_batch % world or not 0 <= rank < world:
            raise ValueError(
                f"global_batch={global_batch} must be a positive multiple of world={world}, "
                f"and rank={rank} below it"
            )
        self.mixture, self.global_batch = mixture, global_batch
        share = global_batch // world
        self.rows = range(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> list[tuple[int, Drawn]]:
        return [(row, self.mixture.draw(step * self.global_batch + row)) for row in self.rows]


def loader(
    mixture: Mixture,
    global_batch: int,
    start_step: int = 0,
    steps: int = 1,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    start_method: str | None = None,
) -> DataLoader:
    """Iterable over steps start_step .. start_step + steps - 1; see MixtureDataset for an item.

    The items do not depend on the number of workers. An error in a worker is raised here.

    Args:
        start_method: "fork", "spawn" or "forkserver" for the workers; None is the platform's.
    """
    return DataLoader(
        MixtureDataset(mixture, global_batch, rank, world),
        batch_size=None,  # an item is a whole step already
        sampler=range(start_step, start_step + steps),
        num_workers=num_workers,
        collate_fn=_identity,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_outlive_signals,
    )


def _outlive_signals(worker: int) -> None:
    """Leave it to the process that trains to end its workers.

    A cluster may signal all processes of a job, and the step that is being finished needs its rows.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is not known
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process when `parent` asks for it with SIGTERM, and nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _identity(item: Any) -> Any:
    return item


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise DataError(
            f"{file}: no such mixture file; those that ship lie in data/configs/, docs/data.md "
            "shows how to write one"
        )
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not yaml: {' '.join(str(error).split())}") from error


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(fits(entry) for entry in value)


def _are_shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(shares, Mapping) and all(map(_is_number, shares.values()))
        for shares in value.values()
    )


# What a value of a mixture file must look like, before its size is looked at.
_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dataset_names": (_all(lambda entry: isinstance(entry, str)), "a list of folder names"),
    "num_used_data": (_all(_is_whole), "a list of whole numbers, one for each data set"),
    "weights": (_all(_is_number), "a list of numbers, one for each data set"),
    "max_reference_rounds": (_is_whole, "a whole number"),
    "max_skip_fraction": (_is_number, "a number such as 0.01"),
    "contexts": (_are_shares, "data set (or default) -> context -> share, shares being numbers"),
}


def _check_contexts(
    group: str, source: str, shares: Mapping[str, float], names: tuple[str, ...]
) -> None:
    if source != "default" and source not in names:
        raise DataError(
            f"{group}: contexts names {source!r}, which is neither default nor one of {names}"
        )
    unknown = [name for name in shares if name not in CONTEXTS]
    if unknown or not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise DataError(
            f"{group}: contexts of {source} are {dict(shares)}; expected non-negative shares, not "
            f"all zero, of {', '.join(CONTEXTS)}"
        )
