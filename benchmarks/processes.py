"""C13: what several processes tell each other."""

import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from benchmarks import measure
from benchmarks.gates import Check, Gate, Settings, at_most
from tests.training import WORLD, metric_lines, opsd_config, workspace
from train import opsd
from train.checkpoint import CheckpointWriter
from train.parallel import RolloutCopy, distributed

STEPS = 2
PATIENCE = 200  # seconds, some ten times what the processes need
PROCESSES = {2: 2, 4: 2}  # size: processes that share one copy of the weights


def collective_runs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of processes, what each process counted and the losses it logged."""
    ports = [_free_port() for _ in PROCESSES]
    context = mp.spawn(
        _process, (ports, str(workspace()), str(folder)), nprocs=max(PROCESSES), join=False
    )
    alone = _counted_run(_run_config(folder / "1", workspace()), WORLD)
    deadline = time.monotonic() + PATIENCE
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"processes were still waiting for each other after {PATIENCE} s")
    found = {1: [alone]}
    for size in PROCESSES:
        files = [folder / f"{size}-{rank}.json" for rank in range(size)]
        found[size] = [json.loads(file.read_text()) for file in files]
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _run_config(folder: Path, space: Path, num_shard: int = 1) -> Any:
    flags = {"model_path": space / "base", "data_root": space / "datasets", "micro_batch": 1}
    flags |= {"total_steps": STEPS, "num_shard": num_shard, "launch_gates": False}
    return opsd_config(folder, **flags)


def _process(process: int, ports: list[int], space: str, folder: str) -> None:
    """What each of the processes does: it takes part in the worlds that are large enough."""
    torch.set_num_threads(1)
    for port, (size, num_shard) in zip(ports, PROCESSES.items(), strict=True):
        if process >= size:
            continue
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(process), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"WORLD_SIZE": str(size)}
        config = _run_config(Path(folder) / str(size), Path(space), num_shard)
        with distributed(config.model, num_shard, config.run.global_batch) as world:
            found = _counted_run(config, world)
        (Path(folder) / f"{size}-{process}.json").write_text(json.dumps(found))


def _counted_run(config: Any, world: Any) -> dict[str, Any]:
    """Train; all-gathers while weights are copied for sampling, and any collective in sampling."""
    parts: dict[str, list[measure.Counts]] = {"refresh": [], "sample": [], "save": []}
    units = []

    def counted(name: str, function: Callable) -> Callable:
        def inner(*args: Any, **kwargs: Any) -> Any:
            if name == "refresh":
                units.append(sum(unit._has_params for unit in FSDP.fsdp_modules(args[1])))
            with measure.counting() as counts:
                out = function(*args, **kwargs)
            parts[name].append(counts)
            return out

        return inner

    with (
        mock.patch.object(RolloutCopy, "refresh", counted("refresh", RolloutCopy.refresh)),
        mock.patch.object(CheckpointWriter, "save", counted("save", CheckpointWriter.save)),
        mock.patch.object(opsd, "sample", counted("sample", opsd.sample)),
        redirect_stdout(io.StringIO()),  # a run says what it has opened
        measure.counting() as total,
    ):
        opsd.train(config, world)
    gathers = sum(_gathers(counts) for counts in parts["refresh"])
    saved = sum(counts.bytes_gathered for counts in parts["save"])
    return {
        "gathers_per_unit": gathers / (STEPS * units[0]) if units else 0.0,
        "units": units[0] if units else 0,  # one process has nothing to copy
        "refreshes": len(parts["refresh"]),
        "in_sampling": sum(counts.collectives.total() for counts in parts["sample"]),
        "bytes_per_step": (total.bytes_gathered - saved) / STEPS,
        "collectives": dict(total.collectives),
        "loss": [line["loss"] for line in metric_lines(Path(config.run.results_dir).parent)]
        if world.is_main
        else [],
    }


def _gathers(counts: measure.Counts) -> int:
    return sum(number for name, number in counts.collectives.items() if "allgather" in name)


def c13(settings: Settings) -> list[Gate]:
    """Collectives of a step on 1, 2 and 4 processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = collective_runs(Path(folder))
    sharded = [record_ for size in PROCESSES for record_ in found[size]]
    (alone,) = found[1]
    gap = max(
        abs(a - b) / abs(b)
        for size in PROCESSES
        for a, b in zip(found[size][0]["loss"], alone["loss"], strict=True)
    )
    checks = (
        Check("loss of 2 and 4 processes and of 1, relative", gap, 1e-4),
        Check("collectives of one process", sum(alone["collectives"].values()), 0),
        Check("counted gathers", 0.0 if min(r["units"] for r in sharded) > 1 else 1.0, 0),
    )
    detail = {
        "units": sharded[0]["units"],
        "bytes_gathered_per_step": {size: found[size][0]["bytes_per_step"] for size in PROCESSES},
        "collectives": {size: found[size][0]["collectives"] for size in PROCESSES},
    }
    return [
        at_most(
            "C13",
            "gathers of each unit's weights per step, for sampling",
            max(r["gathers_per_unit"] for r in sharded),
            "",
            1,
            1,
            checks,
            detail=detail,
        ),
        at_most(
            "C13",
            "collectives while completions are written",
            max(r["in_sampling"] for r in sharded),
            "",
            0,
            0,
            checks,
        ),
    ]
