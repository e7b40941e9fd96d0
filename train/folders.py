"""The folder that takes the checkpoints of a run: what lies in it, and what a run may do there.

Folders whose name is a number of seven or more digits are checkpoints; `best-` and such a number is
the best one so far where it was not to be saved anyway. Only whole ones have these names. Hidden
ones are being written, replaced or removed.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path

from train.config import TrainConfig, UsageError
from train.metrics import Pairs
from train.parallel import World
from train.state import STATE, read_trainer

NUMBERED = re.compile(r"\d{7,}")
BEST = re.compile(r"best-\d{7,}")
LEFT_OVER = re.compile(r"\.(?P<name>(best-)?\d{7,})\.(?P<kind>partial|replaced|removed)")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: after `step` updates, from `folder` if it is resumed."""

    step: int = 0
    folder: Path | None = None
    pending: Pairs = dataclasses.field(default_factory=dict)  # metrics that were not reported


FRESH = Start()


def claim_folders(config: TrainConfig, world: World) -> TrainConfig:
    """Make the output folders ready for a run, or refuse before anything is written. Collective.

    Checkpoints of an earlier run are removed if --overwrite says so, else they are a reason to
    refuse; of a run that is resumed these are the ones after the update it goes on from.
    Half-written ones of a killed run are always removed.

    Returns:
        The configuration with the folder to resume from, if any, in the place of `--resume latest`
        or `auto`.

    Raises:
        UsageError: an output folder is a file or read-only, or has checkpoints that must stay, or
            there is nothing to resume from.
    """
    run, root = config.run, Path(config.run.checkpoint_dir)
    for flag, folder in (("results_dir", run.results_dir), ("checkpoint_dir", run.checkpoint_dir)):
        _check_writable(flag, Path(folder))
    entries = sorted(root.iterdir()) if root.is_dir() else []
    named = (e for e in entries if NUMBERED.fullmatch(e.name) or BEST.fullmatch(e.name))
    earlier = [e for e in named if e.is_dir()]
    start, ignored = find_resumable(config)
    source = start.folder
    if source and source.parent == root.resolve():
        later = (e for e in earlier if updates_of(e) > start.step)
        earlier = [e for e in later if (e / "run.json").is_file()]
        goes_on = True
    else:
        goes_on = source is None and run.resume == "auto"  # it was killed before its first save
    if not run.overwrite:
        # a run that goes on finds its best again
        earlier = [e for e in earlier if not (goes_on and BEST.fullmatch(e.name))]
        if earlier:
            raise UsageError(_refusal(root, earlier, source))
    for flag, path in (("model_path", config.model.model_path), ("resume", source)):
        needed = path and Path(path).resolve()
        if needed and any(entry.resolve() in (needed, *needed.parents) for entry in earlier):
            raise UsageError(
                f"--overwrite True would remove the weights to start from, --{flag} {path}: "
                f"choose another --checkpoint_dir than {root}"
            )
    world.barrier()  # every rank has looked before one of them removes what it looked for
    if world.is_main:
        for line in ignored:
            print(line, flush=True)
        _remove(root, entries, earlier, source)
    resume = str(source) if source else None
    return dataclasses.replace(config, run=dataclasses.replace(run, resume=resume))


def updates_of(folder: Path) -> int:
    """The number in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("best-"))


def find_resumable(config: TrainConfig) -> tuple[Start, list[str]]:
    """Where --resume says to begin, and a line for each folder that was passed over.

    `latest` and `auto` are the folder of --checkpoint_dir with the most updates whose state is
    complete. If there is none, `auto` begins anew.

    Raises:
        UsageError: nothing to resume from.
    """
    resume, root = config.run.resume, Path(config.run.checkpoint_dir)
    if resume is None:
        return FRESH, []
    if resume not in ("latest", "auto"):
        folder = Path(resume).resolve()
        if not folder.is_dir():
            raise UsageError(f"--resume {resume} is no folder; name one, or say latest or auto")
        return Start(read_trainer(folder / STATE)["step"], folder), []
    lines = []
    found = root.iterdir() if root.is_dir() else []
    numbered = [entry for entry in found if NUMBERED.fullmatch(entry.name)]
    for entry in sorted(numbered, key=lambda entry: int(entry.name), reverse=True):
        why = _why_not(entry)
        if why is None:
            return Start(int(entry.name), entry.resolve()), lines
        lines.append(f"ignored {entry}: {why}")
    if resume == "auto":
        return FRESH, lines
    raise UsageError(
        "; ".join(
            [f"--resume latest: nothing to resume from in --checkpoint_dir {root}", *lines]
            + ["start without --resume, or with --resume auto"]
        )
    )


def _why_not(folder: Path) -> str | None:
    """Why a run cannot go on from a numbered folder; None if it can."""
    if not (folder / "run.json").is_file():
        return "no run.json, so not a checkpoint of this project or not a whole one"
    try:
        trainer = read_trainer(folder / STATE)
    except UsageError as error:
        return str(error)
    if trainer["step"] != int(folder.name):
        return f"its state is that of update {trainer['step']}"
    return None


def _refusal(root: Path, earlier: list[Path], source: Path | None) -> str:
    found = f"--checkpoint_dir {root} holds {len(earlier)} checkpoint(s)"
    if source and source.parent == root.resolve():
        return (
            f"{found} after the update to resume from ({earlier[-1].name} is the last, "
            f"{source.name} is --resume): resume from the last one (--resume latest), or remove "
            "them with --overwrite True"
        )
    again = "latest" if NUMBERED.fullmatch(earlier[0].name) else "auto"  # before its first save
    return (
        f"{found} of an earlier run ({earlier[-1].name}): choose another folder (OUTPUT_NAME of "
        f"the launchers), go on with that run (--resume {again}), or remove them with "
        "--overwrite True"
    )


def _remove(root: Path, entries: list[Path], earlier: list[Path], source: Path | None) -> None:
    """Remove `earlier`, links to them, and what killed runs left half-written."""
    if earlier:
        print(f"removing {len(earlier)} checkpoint(s) of an earlier run in {root}", flush=True)
    for name in ("latest", "best"):
        link = root / name
        if link.is_symlink() and os.readlink(link) in {entry.name for entry in earlier}:
            link.unlink()
            if name == "latest" and source and source.parent == root.resolve():
                point(link, source.name)
    for entry in earlier:
        entry.unlink() if entry.is_symlink() else shutil.rmtree(entry)
    for entry in entries:
        if (match := LEFT_OVER.fullmatch(entry.name)) and (
            match["kind"] != "replaced" or (root / match["name"]).exists()
        ):  # a replaced folder without its replacement is the only one of that update
            print(f"ignored {entry}: half-written or half-removed, gone now", flush=True)
            shutil.rmtree(entry)


def _check_writable(flag: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UsageError(f"--{flag} {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--{flag} {folder}: no permission to write in {there}; name another one")


def point(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name` beside it; it exists at every moment."""
    aside = link.with_name(f".{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, link)
    fsync(link.parent)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
