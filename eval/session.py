"""What the measuring entry points share: flags, device, sources, origin of the records, tables."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.mixture import MixtureConfig
from data.parquet import RowReader
from eval.statistics import OVERALL
from modeling.bagel import Bagel
from modeling.pretrained import Weights, find_weights
from train.config import UsageError
from train.records import checkpoint_name, config_hash, run_info

DEFAULT_SOURCES = "data/configs/visual_opsd.yaml"


def parser_of(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all measurements have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", default="models/ThinkMorph-7B", help="checkpoint folder")
    add("--weights", choices=("auto", "student", "ema"), default="auto", help="of that folder")
    add("--device", default="auto", help="auto (cuda where there is a GPU), cpu, cuda or cuda:N")
    add("--data_root", help="folder of the data sets; default VISUAL_OPSD_DATA_ROOT, datasets/")
    add(
        "--dataset_config_file",
        default=DEFAULT_SOURCES,
        help="mixture file that names the sources; image limits are those of the checkpoint",
    )
    add("--output_dir", required=True, help="results are written here")
    return parser


def pick_device(name: str) -> torch.device:
    """`auto`, or a device as torch names it.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}, but torch sees {torch.cuda.device_count()} GPUs: "
            "use --device cpu or auto"
        )
    return device


def positive(**flags: int | None) -> None:
    """Raise UsageError for a flag that is neither None nor at least 1."""
    for name, value in flags.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")


def open_sources(config_file: str) -> MixtureConfig:
    """The mixture file: names of the sources and how many visual thoughts of a row are used."""
    if not Path(config_file).is_file():
        raise UsageError(
            f"--dataset_config_file {config_file}: no such file; mixtures lie in data/configs/"
        )
    return MixtureConfig.load(config_file)


def announce(path: str | Path, weights: Weights, model: Bagel) -> None:
    """Print which weights `model` has: a folder may hold a student and its EMA teacher."""
    opened = find_weights(path, weights).name
    kind = "ema" if Path(opened).name.startswith("ema.") else "student"
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"opened {opened}: {kind} weights, {count:.2f} M parameters", flush=True)


def checkpoint_step(path: str | Path) -> int | None:
    """Optimizer steps of a checkpoint of this project; None for a released folder."""
    file = Path(path) / "run.json"
    return json.loads(file.read_text())["step"] if file.is_file() else None


def origin(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The fields that all records of one measurement share, for `base_record`."""
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    return {
        "kind": kind,
        "system": checkpoint_name(args.model_path),
        "seed": args.seed,
        "step": checkpoint_step(args.model_path),
        "config_hash": config_hash(settings),
        "info": run_info(),
    }


def unusable_rows(reader: RowReader, task: str) -> int:
    """Rows of a task, or of all of them ("overall"), that were passed over."""
    return reader.skipped.total() if task == OVERALL else reader.skipped[task]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
