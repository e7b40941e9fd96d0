"""Result records: what every result file holds, so that each number names its origin.

A record is one flat dictionary; tables and figures are functions of files of such records.
"""

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD_FIELDS = (
    "kind", "system", "task", "id", "values", "seed", "step", "config_hash",
    "commit", "command", "created", "hardware",
)  # fmt: skip


def base_record(
    *,
    kind: str,
    system: str,
    task: str,
    id: str,
    values: Mapping[str, Any],
    seed: int | None,
    step: int | None,
    config_hash: str,
    info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One result record. Pass the same `info` (from `run_info`) to all records of a run."""
    record = dict(kind=kind, system=system, task=task, id=id, values=dict(values))
    record |= dict(seed=seed, step=step, config_hash=config_hash)
    return record | dict(run_info() if info is None else info)


def run_info() -> dict[str, Any]:
    """Origin of the numbers of this process: commit, command, creation time (UTC), hardware."""
    return {
        "commit": git_commit(),
        "command": command_line(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }


def git_commit(root: Path = REPOSITORY) -> str:
    """Commit of the code, with "-dirty" when tracked files differ; "unknown" outside git."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}-dirty" if _git(root, "status", "--porcelain", "-uno") else head


def command_line() -> str:
    """The command of this process as it was typed, `-m module` included, ready for a shell."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def hardware() -> dict[str, Any]:
    """Processor architecture, visible cores, GPU names and the torch version."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "torch": torch.__version__,
    }


def checkpoint_name(path: str | Path) -> str:
    """Name of a checkpoint in records: its folder, with that of the run for numbered ones."""
    folder = Path(path).resolve()
    numbered = re.fullmatch(r"(best-)?\d+", folder.name)
    return f"{folder.parent.name}/{folder.name}" if numbered else folder.name


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of a dataclass or mapping, independent of key order."""
    plain = asdict(config) if is_dataclass(config) else dict(config)
    text = json.dumps(plain, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records to a .jsonl (one per line) or .json (a list) file, atomically."""
    path = Path(path)
    records = [dict(record) for record in records]
    for number, record in enumerate(records, 1):
        _check_record(record, f"record {number} for {path}")
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    elif path.suffix == ".json":
        text = json.dumps(records, indent=1, allow_nan=False) + "\n"
    else:
        raise ValueError(f"{path}: result files end in .json or .jsonl")
    write_atomic(path, text)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_records` wrote; a broken line or a missing field names its place."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        records = json.loads(text)
    else:
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
    for number, record in enumerate(records, 1):
        _check_record(record, f"{path}, record {number}")
    return records


def write_atomic(path: str | Path, text: str) -> None:
    """Write aside, flush to disk, rename: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # mkstemp makes files private to the user
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_record(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not a record")
    missing = [field for field in RECORD_FIELDS if field not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; build records with base_record")


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command in `root`; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
