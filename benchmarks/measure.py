"""Measuring: paired times, peak memory of a stage, counts of operators, what ran where.

Only ratios measured in the same process are worth reporting: two things are timed in turn, after a
warm-up, and the median of the ratios of neighbours is given with its interquartile range. Memory is
the peak above the level at the entry of a stage: on a GPU that of the allocator, on the CPU that of
a fresh process (`python -m benchmarks.measure package.module:function JSON` is that process).
"""

import ctypes
import gc
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], Any]
MB = 1e6


# ---- time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Seconds of two things done in turn. `ratio` is how many times faster the second one is."""

    ratio: float  # median over the pairs of baseline / ours
    low: float  # lower quartile
    high: float  # upper quartile
    baseline_s: float  # median
    ours_s: float  # median
    repeats: int

    @property
    def spread(self) -> str:
        return f"{self.low:.3g}..{self.high:.3g}"


def seconds(work: Work, device: torch.device | str = "cpu") -> float:
    """Wall time on the CPU; on a GPU, between two events of its stream."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def paired(
    baseline: Callable[[], Work],
    ours: Callable[[], Work],
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> Paired:
    """Time both in turn, changing who goes first; the warm-up is not counted.

    Args:
        baseline, ours: set up, untimed, and return what is timed.
    """
    times = []
    for turn in range(warmup + repeats):
        pair = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            pair[side] = seconds((baseline, ours)[side](), device)
        times.append((pair[0], pair[1]))
    times = times[warmup:]
    low, ratio, high = quartiles([first / second for first, second in times])
    (_, first, _), (_, second, _) = (quartiles(list(side)) for side in zip(*times, strict=True))
    return Paired(ratio, low, high, first, second, repeats)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


# ---- memory -----------------------------------------------------------------------------------


def resident(field_name: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field_name}:\s+(\d+) kB", text)[1]) * 1024


@dataclass(frozen=True)
class Peak:
    """Memory of a stage above the level at its entry."""

    peak: int  # bytes
    level: int  # bytes at the entry
    result: Any


def peak_of(stage: Work, device: torch.device | str = "cpu") -> Peak:
    """Peak of `stage` in this process.

    On the CPU call it once per process (see `peak_in_process`): memory that earlier work freed but
    did not give back would hide what the stage takes.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        result = stage()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - level, level, result)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    level = resident()
    result = stage()
    return Peak(resident("VmHWM") - level, level, result)


def peak_in_process(target: str, timeout: float = 120, **arguments: Any) -> Peak:
    """Peak of a stage in a fresh process.

    Args:
        target: "package.module:function"; function(**arguments) sets up and returns the stage,
            whose result must go through json.
    """
    command = [sys.executable, "-m", "benchmarks.measure", target, json.dumps(arguments)]
    # a fixed threshold: what is freed goes back at once, and the peak is that of live tensors
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _child(target: str, arguments: str) -> None:
    torch.set_num_threads(1)
    module, name = target.split(":")
    stage = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(json.dumps(asdict(peak_of(stage))))


def held_bytes(thing: Any) -> int:
    """Bytes of all tensors that are reachable from an object: attributes, containers, closures."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    pending = [thing]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, (list, tuple, set)):
            pending += item
        elif isinstance(item, FunctionType):
            pending += [cell.cell_contents for cell in item.__closure__ or ()]
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType)):
            pending += vars(item).values()
    return sum(storages.values())


# ---- counts -----------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the dispatcher saw. Also what a step function may note in between."""

    dispatches: int = 0
    non_view: int = 0  # of these, operators whose result is not a view of an argument
    syncs: int = 0  # operators, or conversions, that a device would have to be waited for
    scalars: int = 0  # of these, `aten._local_scalar_dense`: .item(), bool(), int(), tensor sizes
    row_tokens: int = 0  # ids looked up in the watched embedding
    collectives: Counter = field(default_factory=Counter)  # c10d operators by name
    bytes_gathered: int = 0  # written by all-gathers
    operators: Counter = field(default_factory=Counter)

    def minus(self, other: "Counts") -> "Counts":
        """What is here and not there."""
        return Counts(
            *(mine - theirs for mine, theirs in zip(_values(self), _values(other), strict=True))
        )


def _values(counts: Counts) -> list[Any]:
    return [getattr(counts, f.name) for f in fields(counts)]


# Operators whose output shape depends on data: the host waits for the device to know it.
_DATA_SHAPED = {
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.unique_consecutive.default",
    "aten._unique2.default",
    "aten.unique_dim.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
}
_BY_MASK = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default"}
_LOOKUPS = {"aten.embedding.default": 1, "aten.index_select.default": 2, "aten.index.Tensor": 1}


class _Dispatches(TorchDispatchMode):
    def __init__(self, counts: Counts, embedding: Tensor | None) -> None:
        super().__init__()
        self.counts, self.embedding = counts, embedding

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        counts, name = self.counts, str(func)
        if name.startswith("c10d"):
            counts.collectives[name.split(".")[1]] += 1
            if "allgather" in name:
                counts.bytes_gathered += _bytes(args[0])
            return out
        counts.dispatches += 1
        counts.operators[name] += 1
        counts.non_view += not _is_view(func)
        counts.scalars += name == "aten._local_scalar_dense.default"
        counts.syncs += _waits(name, args, kwargs or {}, out)
        if name in _LOOKUPS and self.embedding is not None:
            counts.row_tokens += _looked_up(args, _LOOKUPS[name], self.embedding)
        return out


class _Reads(TorchFunctionMode):
    """Conversions that read a CPU tensor without an operator, and would wait for a device."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy):
            self.counts.syncs += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(embedding: Tensor | None = None) -> Iterator[Counts]:
    """Count what runs inside.

    Args:
        embedding: table whose looked-up rows are counted as row-tokens.
    """
    counts = Counts()
    with _Reads(counts), _Dispatches(counts, embedding):
        yield counts


def _is_view(func: Any) -> bool:
    """Whether a result shares memory with an argument that is not written to."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _waits(name: str, args: tuple, kwargs: dict, out: Any) -> bool:
    if name == "aten._local_scalar_dense.default" or name in _DATA_SHAPED:
        return True
    if name in _BY_MASK:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten.repeat_interleave.Tensor":
        return kwargs.get("output_size") is None
    if name == "aten._to_copy.default":
        return isinstance(out, Tensor) and (args[0].device.type, out.device.type) == ("cuda", "cpu")
    if name == "aten.copy_.default":
        return (args[1].device.type, args[0].device.type) == ("cuda", "cpu")
    return False


def _looked_up(args: tuple, place: int, embedding: Tensor) -> int:
    table, ids = args[0], args[place]
    if not isinstance(table, Tensor) or table.data_ptr() != embedding.data_ptr():
        return 0
    if table.shape != embedding.shape:
        return 0
    return (ids if isinstance(ids, Tensor) else ids[0]).numel()


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, (list, tuple)) else 0


# ---- what ran where ---------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """Of this machine, in words and numbers."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()


def provenance(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Commit (with a mark if the tree differs from it), date, command, versions, hardware.

    Args:
        argv: of the command; None for that of this process.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit + ("-dirty" if commit and _git("status", "--porcelain", "-uno") else ""),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python -m benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
        ),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def gemm_rate(
    shape: tuple[int, int, int] = (512, 256, 16384),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """FLOP/s of one matrix product (m, k) @ (k, n), the best of a few."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device).to(dtype)
    times = [seconds(lambda: torch.nn.functional.linear(a, b), device) for _ in range(6)]
    return 2 * m * k * n / min(times)


def read_rate(size: int = 256 << 20, device: torch.device | str = "cpu") -> float:
    """Bytes/s at which memory larger than the caches is read, the best of a few."""
    data = torch.ones(size // 4, device=device)
    return size / min(seconds(data.sum, device) for _ in range(6))


if __name__ == "__main__":
    _child(*sys.argv[1:])
