"""What the trainer tests share: a tiny checkpoint, a few records, short runs in this process."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.miniworld import autoencoder
from data.miniworld.model import TRANSFORM, initialise
from data.miniworld.tokenizer import save_tokenizer
from data.miniworld.world import TASKS
from data.miniworld.write import write_shards
from data.mixture import Drawn
from data.processor import Processor
from data.prompts import MINI
from data.transforms import ImageTransform
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.pretrained import RECOMPUTED, save_pretrained
from modeling.tokenizer import load_tokenizer
from tests.data_helpers import cell, png, record, write_source
from tests.tiny_model import tiny_autoencoder
from train import opsd, sft
from train.config import OpsdConfig, SftConfig, parse_opsd, parse_sft
from train.metrics import OF_THE_MACHINE
from train.parallel import World

WORLD = World(rank=0, size=1, num_shard=1, device=torch.device("cpu"), compute_dtype=torch.float32)
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
ROWS = 12  # training rows per task family
PROBES = 3  # validation rows per task family
VAE_TRANSFORM = ImageTransform(16, 8, 4, 256)  # at most 4x4 latent tokens
# Rows that draw, from two sources, and rows of text: one, two and no pictures to draw.
DRAWN = """interleaved_reasoning:
  dataset_names: [Ragged, Jigsaw_Assembly, Visual_Search]
  weights: [2, 1, 1]
  contexts:
    Visual_Search: {student: 1, teacher: 1}
"""


@functools.cache
def workspace() -> Path:
    """A folder for this process, with `base/` (a checkpoint) and `datasets/`."""
    folder = Path(tempfile.mkdtemp(prefix="visual-opsd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_checkpoint(folder / "base", seed=2)  # completions of all kinds, none empty
    for task in TASKS:
        data = folder / "datasets" / task / "data"
        write_shards(data, task, "train", ROWS, seed=0, shards=range(1))
        write_shards(data, task, "validation", PROBES, seed=0, shards=range(1))
    return folder


@functools.cache
def drawing_base() -> Path:
    """A checkpoint with latent heads and a VAE in the workspace. `drawn.yaml` beside it mixes rows
    to fine-tune it on: those of `datasets/Ragged` have pictures of two sizes.
    """
    path = workspace() / "drawing"
    write_checkpoint(path, seed=2, draws=True)
    autoencoder.save(tiny_autoencoder(), path)
    rows = []
    for i in range(ROWS):
        size = (56, 28) if i % 3 == 0 else (56, 56)
        row = record(i, problem_image_0=cell(png(20 * i, size)), answer="to the left" * (i % 2 + 1))
        if i % 2:
            row |= {"reasoning_image_1": cell(png(7 * i, size)), "resoning_thought_2": "then"}
        rows.append(row)
    write_source(workspace() / "datasets", "Ragged", rows)
    (workspace() / "drawn.yaml").write_text(DRAWN)
    return path


@torch.no_grad()
def write_checkpoint(path: Path, seed: int, draws: bool = False) -> None:
    """An untrained model of two decoder layers that likes to end a round and to ask for images.

    Its residual stream has a constant first channel, through which the text head has a bias.

    draws: with latent heads, whose velocities are not zero.
    """
    save_tokenizer(path)
    limits = (VAE_TRANSFORM,) if draws else ()
    processor = Processor(load_tokenizer(path), TRANSFORM, MINI, *limits)
    processor.save_pretrained(path)
    llm = LLMConfig(processor.tokenizer.vocab_size, 32, 48, 2, 2, 1, max_position_embeddings=512)
    config = BagelConfig(llm, ViTConfig(32, 48, 2, 2, image_size=56), max_latent_size=8)
    model = Bagel(config, visual_gen=draws)
    initialise(model, processor, seed)
    if draws:
        model.llm2vae.weight.normal_(0.0, 0.6, generator=torch.Generator().manual_seed(seed))
    model.language_model.model.embed_tokens.weight[:, 0] = 3.0
    model.connector.fc2.bias[0] = 3.0
    head = model.language_model.lm_head.weight
    head[:, 0] = 0.0
    head[processor.tokenizer.special.eos, 0] = 1.7
    head[processor.tokenizer.encode("<image_start>")[0], 0] = 2.3
    save_pretrained(model.state_dict(), model.config, path, dtype=torch.float32)


def _argv(folder: Path, flags: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    values = {
        "model_path": workspace() / "base",
        "data_root": workspace() / "datasets",
        "results_dir": folder / "results",
        "checkpoint_dir": folder / "checkpoints",
        "num_workers": 0,
        "device": "cpu",
        "total_steps": 2,
        "warmup_steps": 0,
        "lr": 1e-3,
        "global_batch": 4,
        "micro_batch": 4,
        "save_dtype": "float32",
        "log_every": 1,
        "progress": False,
        **defaults,
        **flags,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def opsd_argv(folder: Path, **flags: Any) -> list[str]:
    """Command line of a short distillation run that writes below `folder`."""
    defaults = {
        "dataset_config_file": CONFIGS / "mini_opsd.yaml",
        "jsd_top_k": 32,
        "sample_max_new_tokens": 12,
        "min_completion": 4,
        "max_forward_tokens": 256,
    }
    return _argv(folder, flags, defaults)


def sft_argv(folder: Path, **flags: Any) -> list[str]:
    """Command line of a short fine-tuning run that writes below `folder`."""
    return _argv(folder, flags, {"dataset_config_file": CONFIGS / "mini_pretrain.yaml"})


def opsd_config(folder: Path, **flags: Any) -> OpsdConfig:
    return parse_opsd(opsd_argv(folder, **flags))


def drawing_flags(**flags: Any) -> dict[str, Any]:
    """What makes `run_sft` learn to draw."""
    mixture = {"model_path": drawing_base(), "dataset_config_file": workspace() / "drawn.yaml"}
    return {**mixture, "visual_gen": True, **flags}


def sft_config(folder: Path, **flags: Any) -> SftConfig:
    return parse_sft(sft_argv(folder, **flags))


def run_opsd(folder: Path, **flags: Any) -> list[dict[str, float]]:
    """Metric lines of a distillation run in this process."""
    opsd.train(opsd_config(folder, **flags), WORLD)
    return metric_lines(folder)


def run_sft(folder: Path, **flags: Any) -> list[dict[str, float]]:
    """Metric lines of a fine-tuning run in this process."""
    sft.train(sft_config(folder, **flags), WORLD)
    return metric_lines(folder)


def metric_lines(folder: Path) -> list[dict[str, float]]:
    """What is logged at --log_every, without what depends on the machine."""
    lines = all_lines(folder)
    kept = [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]
    return [line for line in kept if "loss" in line]


def all_lines(folder: Path) -> list[dict[str, float]]:
    """Every line of the metrics, those of validations too."""
    text = (folder / "results" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights_of(folder: Path, step: int | None = None, name: str = "model") -> dict[str, Tensor]:
    """Weights on disk: of a checkpoint folder, or of a run below `folder` after `step` updates.

    Without the constant position table, which exports leave out.
    """
    where = folder if step is None else folder / "checkpoints" / f"{step:07d}"
    state = load_file(where / f"{name}.safetensors")
    return {key: value for key, value in state.items() if key not in RECOMPUTED}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def base_processor() -> Processor:
    return Processor.from_pretrained(workspace() / "base")


def draws(config: SftConfig, step: int = 0) -> list[tuple[int, Drawn]]:
    """(row, draw) of one step, straight from the mixture."""
    mixture = opsd.open_mixture(config)
    rows = range(config.run.global_batch)
    return [(row, mixture.draw(step * len(rows) + row)) for row in rows]


def same_segments(first: list, second: list) -> bool:
    """Equal token ids, grids, pixels and latents."""
    return len(first) == len(second) and all(
        type(one) is type(other) and all(map(_same, vars(one).values(), vars(other).values()))
        for one, other in zip(first, second, strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other
