"""Checkpoints: self-contained folders in the released layout, published atomically; the folder
that takes them.

A folder named N holds the weights after N optimizer updates. It opens as the student; its EMA
teacher, if the run has one, is `ema.safetensors`. `latest` links to the newest folder.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from data.processor import Processor
from modeling.config import BagelConfig
from modeling.pretrained import WeightFiles, save_pretrained
from train.config import DTYPES, SftConfig, UsageError
from train.parallel import World, full_state
from train.records import config_hash, run_info, write_atomic


def claim_folders(config: SftConfig, world: World) -> None:
    """Make the output folders ready for a run, or refuse before anything is written. Collective.

    Checkpoints of an earlier run are removed if --overwrite says so, else they are a reason to
    refuse; half-written ones of a killed run are always removed.

    Raises:
        UsageError: an output folder is a file or read-only, or has checkpoints that must stay.
    """
    run, root = config.run, Path(config.run.checkpoint_dir)
    for flag, folder in (("results_dir", run.results_dir), ("checkpoint_dir", run.checkpoint_dir)):
        _check_writable(flag, Path(folder))
    entries = sorted(root.iterdir()) if root.is_dir() else []
    earlier = [e for e in entries if re.fullmatch(r"\d{7,}", e.name) and e.is_dir()]
    if earlier and not run.overwrite:
        raise UsageError(
            f"--checkpoint_dir {root} holds {len(earlier)} checkpoint(s) of an earlier run "
            f"({earlier[-1].name}): choose another folder (OUTPUT_NAME of the launchers), or "
            "remove them with --overwrite True"
        )
    start = Path(config.model.model_path).resolve()
    if any(entry.resolve() in (start, *start.parents) for entry in earlier):
        raise UsageError(
            f"--overwrite True would remove the weights to start from, --model_path "
            f"{config.model.model_path}: choose another --checkpoint_dir than {root}"
        )
    world.barrier()  # every rank has looked before one of them removes what it looked for
    if not world.is_main:
        return
    if earlier:
        print(f"removing {len(earlier)} checkpoint(s) of an earlier run in {root}", flush=True)
    stale = [entry for entry in entries if re.fullmatch(r"\.\d{7,}\.partial", entry.name)]
    if (root / "latest").is_symlink() and earlier:
        (root / "latest").unlink()
    for entry in (*earlier, *stale):
        entry.unlink() if entry.is_symlink() else shutil.rmtree(entry)


def _check_writable(flag: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UsageError(f"--{flag} {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--{flag} {folder}: no permission to write in {there}; name another one")


@dataclasses.dataclass(frozen=True)
class CheckpointWriter:
    """What every checkpoint of a run shares."""

    config: SftConfig
    model_config: BagelConfig
    processor: Processor
    base: WeightFiles  # generation weights are carried over from here, untouched
    world: World

    def save(self, step: int, student: nn.Module, ema: nn.Module | None = None) -> Path:
        """Write the folder of `step` aside, flush it, then give it its name. Collective."""
        root = Path(self.config.run.checkpoint_dir)
        final, aside = root / f"{step:07d}", root / f".{step:07d}.partial"
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.processor.save_pretrained(aside)
        for name, module in (("model", student), ("ema", ema)):
            if module is not None:
                self._weights(aside, name, module)
                # The main rank writes for long. The others wait for it here: the sharding groups,
                # where they would meet next, have torch's short timeout.
                self.world.barrier()
        if self.world.is_main:
            write_atomic(aside / "run.json", json.dumps(self._origin(step), indent=2) + "\n")
            _publish(aside, final)
        self.world.barrier()
        return final

    def _weights(self, folder: Path, name: str, module: nn.Module) -> None:
        state = full_state(module, self.world)
        if self.world.is_main:
            save_pretrained(
                state,
                self.model_config,
                folder,
                name=name,
                dtype=DTYPES[self.config.run.save_dtype],
                merge_from=self.base,
            )

    def _origin(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "seed": self.config.run.global_seed,
            "preset": self.config.run.preset,
            "config_hash": config_hash(self.config),
            "base": self.config.model.model_path,
            **run_info(),
        }


def _publish(aside: Path, final: Path) -> None:
    """Make `aside` visible as `final` and point `latest` at it; readers never see half a folder."""
    for file in aside.iterdir():
        _fsync(file)
    _fsync(aside)
    if final.exists():  # the same step of an earlier run in this folder
        old = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(aside, final)
        shutil.rmtree(old)
    else:
        os.rename(aside, final)
    link = final.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.with_name("latest"))
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
