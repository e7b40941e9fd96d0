"""The state of a run: all that moves while it trains, in `state/` of a checkpoint folder.

    student/ optimizer/ [ema/]    float32 weights (masters, where there are any), AdamW moments,
                                  EMA teacher
    trainer.json                  step, identity of the run, metrics not reported yet, what was
                                  validated and what the sentinel saw so far, file sizes

Tensors go through torch.distributed.checkpoint: every process writes its share, and any number of
processes, sharded in any way, reads what it needs. They are stored as safetensors and the rest as
json, so nothing is unpickled; still, a state is to be trusted like code, and only an explicit
--resume reads it.

Random streams and the order of records are functions of (seed, step, row), and so is the learning
rate of the schedule: none of them has state. Nor has the count of skipped rows that stops a run.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW

from data.mixture import Mixture
from modeling.pretrained import WeightFiles
from train.config import DTYPES, OpsdConfig, TrainConfig, UsageError
from train.metrics import Pairs, add_pairs, gather_from_ranks
from train.parallel import World
from train.records import write_atomic

STATE = "state"
FORMAT = 1
FILE_BYTES = 2 * 10**9  # a file is put together in memory before it is written

# Settings that a resumed run may change: they say where it runs and what it leaves behind. The
# contents of the first four are compared instead.
FREE = frozenset(
    ["model_path", "weights", "dataset_config_file", "compute_dtype"]
    + ["data_root", "num_workers", "device", "attention_backend", "activation_checkpointing"]
    + ["preset", "results_dir", "checkpoint_dir", "overwrite", "resume", "micro_batch"]
    + ["num_shard", "save_every", "save_dtype", "save_state", "keep_last", "log_every"]
    + ["progress", "tensorboard_dir", "wandb_project", "launch_gates"]
    + ["validate_every", "validation_samples", "sentinel", "adam_moments"]
)
# With --sentinel lower_lr the learning rate depends on what is looked at, and when.
LOOKS = ("sentinel", "log_every", "validate_every", "validation_samples")
SMALL_FILES = ("llm_config.json", "vit_config.json", "tokenizer.json", "preprocessor_config.json")
AUTOENCODER = ("vae_config.json", "ae.safetensors")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of each weight file


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run has measured, beside its tensors."""

    pending: Pairs  # this rank's metrics since the last report
    validation: dict[str, Any]  # see `Validation.progress`, the same on all ranks
    sentinel: dict[str, Any]  # see `Sentinel.progress`, the same on all ranks


def run_identity(
    config: TrainConfig, mixture: Mixture, base: WeightFiles, world: World
) -> dict[str, Any]:
    """Name -> value of all that makes a run this run, as json has it.

    Two runs with equal identities draw the same records, sample with the same streams and apply the
    same updates, on any number of processes.
    """
    sections = (getattr(config, field.name) for field in dataclasses.fields(config))
    flags = [pair for section in sections for pair in dataclasses.asdict(section).items()]
    lowers = isinstance(config, OpsdConfig) and config.validation.sentinel == "lower_lr"
    free = FREE.difference(LOOKS) if lowers else FREE
    identity = {f"--{name}": value for name, value in flags if name not in free}
    names = {dtype: name for name, dtype in DTYPES.items()}
    identity["--compute_dtype"] = names[world.compute_dtype]
    identity["contents of --model_path"] = _fingerprint(Path(config.model.model_path), base)
    for name, value in dataclasses.asdict(mixture.config).items():
        identity[f"{name} of --dataset_config_file"] = value
    for source in mixture.sources:
        identity[f"rows of {source.name}"] = len(source)
        identity[f"row groups of {source.name}"] = len(source.group_sizes)
    return json.loads(json.dumps(identity))


def _fingerprint(folder: Path, weights: WeightFiles) -> str:
    """Hash of the configuration and of samples of every weight file; 29 GB take a second."""
    digest = hashlib.sha256()
    for name in SMALL_FILES:
        file = folder / name
        digest.update(file.read_bytes() if file.is_file() else b"absent")
    pictures = [file for name in AUTOENCODER if (file := folder / name).is_file()]
    for file in sorted({*weights.location.values(), *pictures}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for sample in range(SAMPLES):
                handle.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def save_state(
    folder: Path,
    step: int,
    identity: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizer: AdamW,
    progress: Progress,
    world: World,
) -> None:
    """Write `folder` (`state/` of a checkpoint that is not published yet). Collective.

    modules: "student" and, if the run has one, "ema".
    """
    for name, module in modules.items():
        _write(folder / name, get_model_state_dict(module), world)
    moments, updates = _split(get_optimizer_state_dict(modules["student"], optimizer)["state"])
    _write(folder / "optimizer", moments, world)
    everyone = gather_from_ranks(progress.pending)
    world.barrier()  # all files are there
    if world.is_main:
        trainer = {
            "format": FORMAT,
            "step": step,
            "identity": identity,
            "updates": updates,
            "pending": everyone,
            "validation": progress.validation,
            "sentinel": progress.sentinel,
            "files": _sizes(folder),
        }
        write_atomic(folder / "trainer.json", json.dumps(trainer, indent=1) + "\n")


def load_state(
    folder: Path,
    identity: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizer: AdamW,
    world: World,
) -> Pairs:
    """Put everything back in place; returns this rank's pending metrics. Collective.

    Raises:
        UsageError: the state is damaged, or that of another run (the settings are named).
    """
    trainer = read_trainer(folder)
    check_identity(folder, trainer["identity"], identity)
    for name, module in modules.items():
        state = get_model_state_dict(module)
        _read(folder / name, state, world)
        set_model_state_dict(module, state)
    state = get_optimizer_state_dict(modules["student"], optimizer)
    moments, _ = _split(state["state"])
    _read(folder / "optimizer", moments, world)
    for name, values in state["state"].items():
        values["step"] = torch.full_like(values["step"], trainer["updates"][name])
    set_optimizer_state_dict(modules["student"], optimizer, state)
    # A rank takes its own sums, and on another number of processes those of several or of none.
    return add_pairs(trainer["pending"][world.rank :: world.size])


def read_trainer(folder: Path) -> dict[str, Any]:
    """`trainer.json` of a state whose files are all there.

    Raises:
        UsageError: it is missing, damaged, from another version, or its files are not complete.
    """
    file = folder / "trainer.json"
    if not file.is_file():
        raise UsageError(f"{file} is missing: written with --save_state False, or not to the end")
    try:
        trainer = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not JSON ({error})") from error
    if not isinstance(trainer, dict) or trainer.get("format") != FORMAT:
        raise UsageError(f"{file} is not of format {FORMAT}, the one that this version writes")
    found = _sizes(folder)
    for name, size in trainer["files"].items():
        if found.get(name) != size:
            raise UsageError(f"{folder / name} has {found.get(name, 0)} of its {size} bytes")
    return trainer


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _split(state: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """AdamW's state as flat moments, and how many updates each parameter has had."""
    moments = {
        f"{name}.{key}": value
        for name, values in state.items()
        for key, value in values.items()
        if key != "step"
    }
    return moments, {name: int(values["step"]) for name, values in state.items()}


def _write(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    filled, files = 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + filled // FILE_BYTES
        filled += tensor.numel() * tensor.itemsize
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    with _alone_without_warning():
        dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)


def _read(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with _alone_without_warning():
            dcp.load(tensors, storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        text = " ".join(str(cause).split())
        raise UsageError(f"{folder} cannot be read (rank {rank}: {text})") from error


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """One process is what was asked for; torch remarks on it at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def check_identity(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    names = sorted(there.keys() | here.keys())
    differing = [name for name in names if there.get(name) != here.get(name)]
    if differing:
        listed = "; ".join(
            f"{name} is {there.get(name, 'not set')} there and {here.get(name, 'not set')} here"
            for name in differing
        )
        raise UsageError(
            f"--resume {folder.parent} would become another run: {listed}. Resume with the "
            "settings of that run, or start a new one from its weights (--model_path) in another "
            "folder"
        )
