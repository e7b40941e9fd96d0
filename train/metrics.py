"""Training metrics: exact global means, one jsonl line per logged step, progress bar, dashboards.

Values are added up on their device as (sum, count) pairs and become floats once per log interval.
Across ranks the sums and counts are added, not the means, so unequal ranks weigh correctly.
"""

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from train.records import write_atomic

Pairs = dict[str, tuple[float, float]]  # name -> sum, count
Line = dict[str, float]  # name -> value
ON_THE_BAR = ("loss", "completion_length", "lr")  # the rest is in the file
SPEED = "tokens_per_second"
PEAK = "peak_memory_mib"
VALIDATION = "val/"  # begins the names of what comes after an update, and after its checkpoint
OF_THE_MACHINE = (SPEED, PEAK)  # no two runs have these alike
T = TypeVar("T")


class MetricLogger:
    """Collects metrics on every rank; rank 0 writes them.

    path: jsonl file, appended to; lines after the checkpoint of `start_step` are dropped first, so
        that a resumed run does not repeat any. None writes no file.
    log_every: `log` reports at steps divisible by it, and at `total_steps`.
    gather: rank-local object -> list of all ranks' objects; torch.distributed when initialised.
    device: whose peak memory is reported; None leaves it out.
    tensorboard_dir, wandb_project: asked for means needed; a missing package is an error.
    config: settings of the run, kept by wandb.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        total_steps: int,
        start_step: int = 0,
        log_every: int = 1,
        rank: int = 0,
        progress: bool = True,
        device: torch.device | None = None,
        gather: Callable[[Pairs], list[Pairs]] | None = None,
        tensorboard_dir: str | None = None,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        if log_every < 1:
            raise ValueError(f"log_every={log_every} must be at least 1; 1 logs every step")
        self.total_steps, self.log_every, self.rank = total_steps, log_every, rank
        self.device = device
        self._tokens, self._seconds = 0, 0.0
        self._started: float | None = None
        self._gather = gather or gather_from_ranks
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._file = self._bar = self._board = self._wandb = None
        # Every rank looks for the packages: one that stops alone would leave the others waiting.
        tensorboard = _needed("tensorboard", "--tensorboard_dir") if tensorboard_dir else None
        wandb = _needed("wandb", "--wandb_project") if wandb_project else None
        if rank != 0:
            return
        if path is not None:
            self._file = _open_from(Path(path), start_step)
        if progress:
            self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True)
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir, purge_step=start_step + 1)
        if wandb is not None:
            self._wandb = wandb.init(project=wandb_project, config=config or {})

    def observe(self, **values: Tensor | float) -> None:
        """Add values to the running means. A tensor counts with all its elements (0 included)."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                total, count = value.detach().double().sum(), value.numel()
            else:
                total, count = float(value), 1
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def observe_global(self, **values: float) -> None:
        """Add values that all ranks have alike: they count once, whatever the number of ranks."""
        if self.rank == 0:
            self.observe(**values)

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """The items of `steps`, on a clock: it runs from the request for an item to `log`.

        What comes after `log`, checkpoints and validation, does not count.
        """
        iterator = iter(steps)
        while True:
            self._started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def count_tokens(self, tokens: int) -> None:
        """Add tokens of this rank to those whose number per second of the clock is reported."""
        self._tokens += tokens

    def reports(self, step: int) -> bool:
        """Whether `log` reports after `step` completed updates."""
        return step % self.log_every == 0 or step == self.total_steps

    def log(
        self, step: int, watch: Callable[[Line], Line] | None = None, **now: float
    ) -> Line | None:
        """Report after `step` completed updates: means since the last report, and `now` as is.

        Returns the line (the same on all ranks), or None between reports. Collective over ranks.
        `now` holds values that are already global (learning rate, tokens so far, seconds); `watch`
        is shown the line and says what else belongs to it.
        """
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None
        if not self.reports(step):
            return None
        pairs = self._local_pairs() | self._machine_pairs()
        line = {"step": step, **_means(self._gather(pairs)), **now}
        if watch is not None:
            line |= watch(line)
        if self.rank == 0:
            self._write(line)
        return line

    def validated(self, step: int, values: dict[str, float | None]) -> None:
        """Write a line of its own, at once, with values that all ranks have alike."""
        if self.rank == 0:
            self._write({"step": step} | {VALIDATION + name: v for name, v in values.items()})

    def close(self) -> None:
        """Finish the progress bar and close the files."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def pending(self) -> Pairs:
        """This rank's sums and counts since the last report, as numbers; they stay."""
        self.restore(pairs := self._local_pairs())
        return pairs

    def restore(self, pairs: Pairs) -> None:
        """Go on from what `pending` gave."""
        self._sums = {name: total for name, (total, _) in pairs.items()}
        self._counts = {name: count for name, (_, count) in pairs.items()}

    def _local_pairs(self) -> Pairs:
        """This rank's sums and counts as numbers, read back in one transfer per device; resets."""
        sums = {name: value for name, value in self._sums.items() if not isinstance(value, Tensor)}
        by_device: dict[torch.device, list[str]] = {}
        for name, value in self._sums.items():
            if isinstance(value, Tensor):
                by_device.setdefault(value.device, []).append(name)
        for names in by_device.values():
            totals = torch.stack([self._sums[name] for name in names]).tolist()
            sums.update(zip(names, totals, strict=True))
        pairs = {name: (sums[name], count) for name, count in self._counts.items()}
        self._sums, self._counts = {}, {}
        return pairs

    def _machine_pairs(self) -> Pairs:
        """Tokens since the last report over the seconds of rank 0's clock, and peak memory."""
        pairs: Pairs = {}
        if self._tokens or self._seconds:
            pairs[SPEED] = (self._tokens, self._seconds if self.rank == 0 else 0.0)
        if self.device is not None:
            pairs[PEAK] = (peak_memory(self.device), 1)
        self._tokens, self._seconds = 0, 0.0
        return pairs

    def _write(self, line: dict[str, float | None]) -> None:
        step = line["step"]
        finite = {k: v for k, v in line.items() if v is not None and math.isfinite(v)}
        if self._file is not None:
            # JSON has no NaN: such values become null and stay visible under their name.
            row = {name: finite.get(name) for name in line}
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        shown = {name: value for name, value in finite.items() if name != "step"}
        on_the_bar = {n: f"{shown[n]:.4g}" for n in ON_THE_BAR if n in shown}
        if self._bar is not None and on_the_bar:
            self._bar.set_postfix(on_the_bar)
        if self._board is not None:
            for name, value in shown.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(shown, step=step)


def say(text: str) -> None:
    """Print a line above the progress bar, if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def peak_memory(device: torch.device) -> float:
    """Most memory so far, MiB: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)  # in bytes there, else in KiB


def gather_from_ranks(mine: T) -> list[T]:
    """Everyone's object, e.g. pairs: ranks may have observed different names. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def add_pairs(ranks: Iterable[Pairs]) -> Pairs:
    """Sums and counts of several ranks together."""
    added: Pairs = {}
    for pairs in ranks:
        for name, (total, count) in pairs.items():
            sums, counts = added.get(name, (0.0, 0))
            added[name] = (sums + total, counts + count)
    return added


def _means(ranks: list[Pairs]) -> dict[str, float]:
    """Sum of sums over sum of counts; names without a single value are left out.

    The peak of memory is that of the rank with the largest.
    """
    means = {name: total / count for name, (total, count) in add_pairs(ranks).items() if count}
    if PEAK in means:
        means[PEAK] = max(pairs[PEAK][0] for pairs in ranks)
    return means


def _open_from(path: Path, start_step: int):
    """Open the jsonl file for appending, with whole lines up to the checkpoint of `start_step`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may tear the last
        kept = [line for line in whole if not _comes_after(json.loads(line), start_step)]
        if len(kept) != len(lines):
            write_atomic(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _comes_after(row: dict[str, float | None], step: int) -> bool:
    """Whether a line was written after the checkpoint of `step`."""
    validated = any(name.startswith(VALIDATION) for name in row)
    return row["step"] > step or (row["step"] == step and validated)


def _needed(package: str, asked_by: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{asked_by} needs the package {package}, which is not installed: pip install {package}"
        ) from error
