"""What the tests of measurements share: a small world on disk and two untrained checkpoints."""

from pathlib import Path

from data.miniworld.model import write_untrained
from data.miniworld.world import TASKS
from data.miniworld.write import write_shards

ROWS = 6  # per task


def write_world(root: Path) -> Path:
    """Data sets with a validation split, and two checkpoints, `base` and `other`."""
    for task in TASKS:
        data = root / "datasets" / task / "data"
        write_shards(data, task, "validation", ROWS, seed=0, shards=range(1))
    write_untrained(root / "base", seed=0)
    write_untrained(root / "other", seed=1)
    return root


def flags(root: Path, output: Path, **changes: object) -> list[str]:
    """Command line of a measurement of `base` on the validation split."""
    values = {
        "model_path": root / "base",
        "data_root": root / "datasets",
        "dataset_config_file": "data/configs/mini_opsd.yaml",
        "split": "validation",
        "device": "cpu",
        "output_dir": output,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
