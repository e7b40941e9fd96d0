"""Checkpoints: self-contained folders in the released layout, published atomically.

A folder named N holds the weights after N optimizer updates. It opens as the student; its EMA
teacher, if the run has one, is `ema.safetensors`. `latest` links to the newest folder.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from data.processor import Processor
from modeling.config import BagelConfig
from modeling.pretrained import WeightFiles, save_pretrained
from train.config import DTYPES, SftConfig
from train.parallel import World, full_state
from train.records import config_hash, run_info, write_atomic


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
