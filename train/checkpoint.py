"""Checkpoints: self-contained folders in the released layout, published atomically.

A folder named N holds the weights after N optimizer updates. It opens as the student; its EMA
teacher, if the run has one, is `ema.safetensors`. `latest` links to the newest folder, `best` to
the best: one of these, or `best-N` where none was due after N updates. `state/` is what a run needs
to go on from there (train/state.py).
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import AdamW

from data.processor import Processor
from modeling.config import BagelConfig
from modeling.pretrained import WeightFiles, save_pretrained
from train.config import DTYPES, TrainConfig, UsageError
from train.folders import BEST, NUMBERED, Start, find_resumable, fsync, point
from train.metrics import MetricLogger
from train.parallel import World, full_state
from train.records import config_hash, run_info, write_atomic
from train.sentinel import Sentinel
from train.state import (
    AUTOENCODER,
    LOOKS,
    STATE,
    Progress,
    check_identity,
    load_state,
    read_trainer,
    save_state,
)

POLICY = "--sentinel"  # in the identity of a run whose learning rate depends on it
STOPPED = "stopped_by_sentinel"  # in run.json: the reason, or null


@dataclasses.dataclass(frozen=True)
class CheckpointWriter:
    """What every checkpoint of a run shares."""

    config: TrainConfig
    model_config: BagelConfig
    processor: Processor
    base: WeightFiles  # generation weights are carried over from here, untouched
    world: World
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see train/state.py

    def resume(self, student: nn.Module, ema: nn.Module | None, optimizer: AdamW) -> Start:
        """Put the state that --resume asks for in place; a fresh start without it. Collective."""
        start = check_same_run(self.config, self.identity, self.world)
        if start.folder is None:
            return start
        modules = _modules(student, ema)
        state, identity = start.folder / STATE, dict(self.identity)
        pending = load_state(state, identity, modules, optimizer, self.world)
        if self.world.is_main:
            total = self.config.optim.total_steps
            print(f"resumed {start.folder} after {start.step} of {total} updates", flush=True)
        return dataclasses.replace(start, pending=pending)

    def due(self, step: int) -> bool:
        """Whether a folder is to be written after `step` updates."""
        return step % self.config.run.save_every == 0 or step == self.config.optim.total_steps

    def save(
        self,
        step: int,
        student: nn.Module,
        ema: nn.Module | None = None,
        optimizer: AdamW | None = None,
        metrics: MetricLogger | None = None,
        validation: Mapping[str, Any] | None = None,
        sentinel: Sentinel | None = None,
    ) -> Path:
        """Publish the folder of `step`, and point `latest` at it. Collective.

        With `optimizer` it can be resumed, unless --save_state False; `metrics` then are the ones
        whose means go on, `validation` what was validated so far, `sentinel` the one of the run. Of
        the folders before it, --keep_last stay.
        """
        final = self._root / f"{step:07d}"
        aside = self._write_aside(final, student, ema)
        if optimizer is not None and self.config.run.save_state:
            modules, identity = _modules(student, ema), dict(self.identity)
            pending = metrics.pending() if metrics else {}
            seen = sentinel.progress() if sentinel else {}
            so_far = Progress(pending, dict(validation or {}), seen)
            save_state(aside / STATE, step, identity, modules, optimizer, so_far, self.world)
        self._publish(aside, final, step, sentinel.stopped if sentinel else None)
        if self.world.is_main:
            point(self._root / "latest", final.name)
            self._keep_last(self._root)
        self.world.barrier()
        return final

    def save_best(self, step: int, student: nn.Module, ema: nn.Module | None = None) -> None:
        """Point `best` at the folder of `step`, or at one without state if it has none. Collective.

        What was the best before goes, unless it was saved for its own sake. A `best-N` that is
        there already is of an earlier attempt, whose settings may have been others.
        """
        if not _is_ours(self._root / f"{step:07d}"):
            final = self._root / f"best-{step:07d}"
            self._publish(self._write_aside(final, student, ema), final, step)
        self.mark_best(step)

    def mark_best(self, step: int) -> None:
        """Point `best` at the folder of `step`, which --keep_last then spares. Collective.

        Raises:
            ValueError: there is no such folder.
        """
        folder = self._holds(step)
        if folder is None:
            raise ValueError(
                f"no checkpoint {step:07d} in {self._root} to mark as the best: save it first"
            )
        self.world.barrier()  # every rank has looked
        if self.world.is_main:
            point(self._root / "best", folder.name)
            for entry in self._root.iterdir():
                if BEST.fullmatch(entry.name) and entry.name != folder.name:
                    _remove(entry)
        self.world.barrier()

    def best(self) -> str | None:
        """Where the best so far is, e.g. `run/best (best-0000070)`; None where none is marked."""
        link = self._root / "best"
        return f"{link} ({os.readlink(link)})" if link.is_symlink() else None

    @property
    def _root(self) -> Path:
        return Path(self.config.run.checkpoint_dir)

    def _holds(self, step: int) -> Path | None:
        """The folder with the weights after `step` updates."""
        candidates = (self._root / f"{step:07d}", self._root / f"best-{step:07d}")
        return next((folder for folder in candidates if _is_ours(folder)), None)

    def holds(self, step: int) -> bool:
        """Whether the weights after `step` updates are there."""
        return self._holds(step) is not None

    def _write_aside(self, final: Path, student: nn.Module, ema: nn.Module | None) -> Path:
        """All that it takes to use what will be `final`. Collective."""
        aside = final.with_name(f".{final.name}.partial")
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.processor.save_pretrained(aside)
            copy_autoencoder(self.config.model.model_path, aside)
        for name, module in (("model", student), ("ema", ema)):
            if module is not None:
                self._weights(aside, name, module)
                # The main rank writes for long. The others wait for it here: the sharding groups,
                # where they would meet next, have torch's short timeout.
                self.world.barrier()
        return aside

    def _publish(self, aside: Path, final: Path, step: int, stopped: str | None = None) -> None:
        """Give the folder its name; readers never see half of it. Collective."""
        if self.world.is_main:
            origin = self._origin(step) | {STOPPED: stopped}
            write_atomic(aside / "run.json", json.dumps(origin, indent=2) + "\n")
            for file in aside.rglob("*"):
                fsync(file)
            fsync(aside)
            if final.exists():  # the same step of an earlier run in this folder
                old = final.with_name(f".{final.name}.replaced")
                shutil.rmtree(old, ignore_errors=True)
                os.rename(final, old)
                os.rename(aside, final)
                shutil.rmtree(old)
            else:
                os.rename(aside, final)
        self.world.barrier()

    def _keep_last(self, root: Path) -> None:
        """Remove all but the newest checkpoints of this folder, the best, and where we started."""
        keep = self.config.run.keep_last
        if not keep:
            return
        start = Path(self.config.model.model_path).resolve()
        spared = {(root / name).resolve() for name in ("latest", "best")} | {start, *start.parents}
        ours = [
            entry for entry in root.iterdir() if NUMBERED.fullmatch(entry.name) and _is_ours(entry)
        ]
        for entry in sorted(ours, key=lambda entry: int(entry.name))[:-keep]:
            if entry.resolve() not in spared and not entry.is_symlink():
                _remove(entry)

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


def check_same_run(config: TrainConfig, identity: Mapping[str, Any], world: World) -> Start:
    """Where --resume says to begin, if that is the run of this identity. Collective.

    Raises:
        UsageError: it is another run (the settings are named), or not the same for all processes.
    """
    start, _ = find_resumable(config)
    if world.sum(start.step) != start.step * world.size:
        raise UsageError(
            f"the processes find different checkpoints in {config.run.checkpoint_dir} "
            f"(here {start.folder}): put it on storage that all of them share"
        )
    if start.folder is None:
        return start
    state = start.folder / STATE
    there, here = read_trainer(state)["identity"], dict(identity)
    if (POLICY in there) != (POLICY in here):
        there, here = _with_policy(there), _with_policy(here)
    check_identity(state, there, here)
    return start


def _with_policy(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity to be shown: of the looks, which are part of a run where they lower the learning
    rate, the policy alone, which is why the others are there.
    """
    shown = {name: v for name, v in identity.items() if name.removeprefix("--") not in LOOKS}
    return {**shown, POLICY: identity.get(POLICY, "not lower_lr")}


def copy_autoencoder(source: str | Path, folder: Path) -> None:
    """The VAE of a checkpoint folder, if it has one: pictures are drawn with it."""
    for name in AUTOENCODER:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def updates_in(folder: Path) -> int:
    """How many updates the weights of a checkpoint folder have had."""
    return json.loads((folder / "run.json").read_text())["step"]


def stopped_by_sentinel(folder: Path) -> str | None:
    """Why the run ended with this checkpoint, where the sentinel ended it."""
    # earlier versions, whose folders can be resumed, wrote no such line
    return json.loads((folder / "run.json").read_text()).get(STOPPED)


def _is_ours(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, hidden)  # nobody opens half of it
    shutil.rmtree(hidden)


def _modules(student: nn.Module, ema: nn.Module | None) -> dict[str, nn.Module]:
    return {"student": student} if ema is None else {"student": student, "ema": ema}
