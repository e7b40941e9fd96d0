"""C14 and C15: tokens that are thrown away, and rows that are read for nothing."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch

from benchmarks import measure
from benchmarks.gates import Check, Gate, Settings, at_most
from data.mixture import Mixture, MixtureConfig
from modeling.generation import generate
from modeling.pretrained import load_pretrained
from modeling.sequence import pack
from tests.data_helpers import cell, record, write_source
from tests.training import base_processor, draws, opsd_config, workspace
from train import rollout
from train.rollout import prepare, sample


def c14(settings: Settings) -> list[Gate]:
    """Tokens that were sampled and are not scored, under a cap that bites."""
    written = []

    def spy(*args: Any, **kwargs: Any) -> list:
        written.extend(out := generate(*args, **kwargs))
        return out

    with tempfile.TemporaryDirectory() as folder:
        config = opsd_config(
            Path(folder), global_batch=12, max_forward_tokens=72, sample_max_new_tokens=24
        )
    processor, rows = base_processor(), draws(config)
    prompts = prepare(rows, processor, config.sampling, 0, 5, False)
    model, cap = load_pretrained(workspace() / "base"), config.sampling.max_forward_tokens
    with mock.patch.object(rollout, "generate", spy):
        trajectories = sample(model, prompts, processor, config.sampling.params, 0, 5)
    packs = [pack([t.teacher], processor.tokenizer.special) for t in trajectories]
    scored = sum(len(b.labels) - t.ends_open for b, t in zip(packs, trajectories, strict=True))
    sampled = sum(len(r.logprobs) for r in written if r.token_ids)
    beyond = sum(max(len(batch) - cap, 0) for batch in packs)
    bitten = sum(p.budget < config.sampling.sample_max_new_tokens for p in prompts)
    return [
        at_most(
            "C14",
            "tokens sampled and not scored, or beyond the cap",
            sampled - scored + beyond,
            f"of {sampled}",
            0,
            0,
            checks=(Check("the cap limits some budget", 0.0 if bitten else 1.0, 0),),
            detail={"prompts": len(prompts), "limited_by_the_cap": bitten},
        )
    ]


ROW_BYTES, DATA_ROWS = 400_000, 120


def _write_heavy_rows(root: Path) -> None:
    noise = torch.randint(256, (ROW_BYTES,), dtype=torch.uint8).numpy().tobytes()
    rows = [record(i, problem_image_0=cell(noise[i:])) for i in range(DATA_ROWS)]
    write_source(root, "Heavy", rows, files=2, row_group_size=20)


def opening(kind: str, root: str) -> measure.Work:
    """For a process of its own: open a mixture, or read its tables as the release does."""
    with tempfile.TemporaryDirectory() as folder:
        write_source(Path(folder), "Light", [record(0)])
        len(Mixture(MixtureConfig("visual_opsd", ("Light",)), folder).sources[0])
        next(pq.ParquetFile(f) for f in Path(folder).rglob("*.parquet")).read()
    if kind == "ours":
        config = MixtureConfig("visual_opsd", ("Heavy",))
        return lambda: sum(map(len, Mixture(config, root).sources))
    files = sorted(Path(root).rglob("*.parquet"))
    return lambda: sum(pq.read_table(file).num_rows for file in files)


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Names of the calls that read pages of parquet files."""
    calls: list[str] = []
    watched = [(pq.ParquetFile, name) for name in ("read", "read_row_group", "iter_batches")]
    with ExitStack() as stack:
        for owner, name in [*watched, (pq.ParquetFile, "read_row_groups"), (pq, "read_table")]:
            noting = _noting(calls, name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, noting))
        yield calls


def _noting(calls: list[str], name: str, function: Callable) -> Callable:
    def inner(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return inner


def c15(settings: Settings) -> list[Gate]:
    """What opening a mixture reads."""
    with tempfile.TemporaryDirectory() as folder:
        _write_heavy_rows(Path(folder))
        with counted_reads() as calls:
            mixture = Mixture(MixtureConfig("visual_opsd", ("Heavy",)), folder)
        opened = len(calls)
        with counted_reads() as calls:
            mixture.sources[0].row(0)
        peaks = {
            kind: measure.peak_in_process("benchmarks.reading:opening", kind=kind, root=folder)
            for kind in ("plain", "ours")
        }
    wrong = sum(abs(count.result - DATA_ROWS) for count in peaks.values())
    checks = (
        Check("rows counted", wrong, 0),
        Check("a row is read by one call that is counted", abs(len(calls) - 1), 0),
    )
    detail = {"file_mb": ROW_BYTES * DATA_ROWS / measure.MB}
    detail |= {f"{kind}_mb": peak.peak / measure.MB for kind, peak in peaks.items()}
    return [
        at_most("C15", "reads of pages when a mixture is opened", opened, "", 0, 0, checks),
        at_most(
            "C15",
            "peak memory of opening a mixture, ours / plain",
            peaks["ours"].peak / peaks["plain"].peak,
            "x",
            0.1,
            0.05,
            checks,
            detail=detail,
        ),
    ]
