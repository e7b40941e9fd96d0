"""What the training entry points share: opening the model, optimizer, loader, errors without
traceback.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import AdamW
from torch.utils.data import DataLoader

from data.example import DataError
from data.mixture import Drawn, Mixture, MixtureConfig, load_mixture, loader
from data.processor import Processor, check_image_limits
from modeling.bagel import Bagel, NoGenerationError
from modeling.config import BagelConfig, ConfigError
from modeling.pretrained import (
    CheckpointError,
    Experts,
    WeightFiles,
    find_weights,
    load_pretrained,
)
from modeling.tokenizer import TokenizerError
from train.checkpoint import CheckpointWriter, check_same_run, stopped_by_sentinel, updates_in
from train.config import OpsdConfig, TrainConfig, UsageError, save_config
from train.folders import FRESH, Start, claim_folders, find_resumable
from train.gates import GateError
from train.interrupts import EXIT_STOPPED
from train.master import MasterWeights
from train.metrics import MetricLogger
from train.optim import NonFiniteError, build_optimizer
from train.parallel import LostRankError, World, distributed
from train.sentinel import Sentinel, Setting, restored
from train.state import STATE, read_trainer, run_identity

USER_ERRORS = (
    UsageError,
    ConfigError,
    CheckpointError,
    TokenizerError,
    DataError,
    NonFiniteError,
    LostRankError,
    GateError,
    NoGenerationError,
    FileNotFoundError,
    ImportError,
)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """What the user can mend is one line on stderr and exit status 2, not a traceback.

    Every rank that fails says so, under its number from rank 1 on: what one of them meets, the
    others may not.
    """
    try:
        yield
    except USER_ERRORS as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"{f'[rank {rank}] ' if rank else ''}error: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    """The text of an error; one of a data loading process comes wrapped in its traceback."""
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker" in text:
        return text.rstrip().splitlines()[-1].partition(": ")[2]
    return text


def run(config: TrainConfig, train: Callable[[Any, World], Path]) -> None:
    """What a command line does: join the processes, claim the output folders, train.

    `train` runs all steps, or stops early where a signal asks for it or the sentinel finds that it
    collapses, and returns the folder of the last checkpoint. A run that was stopped by a signal
    leaves with status 75: try again. One that the sentinel ended is finished.
    """
    with (
        exit_on_user_error(),
        distributed(config.model, config.run.num_shard, config.run.global_batch) as world,
    ):
        config = claim_folders(config, world)
        last = train(config, world)
        if world.is_main:
            print(f"saved {last}")
    stopped = updates_in(last)
    if stopped < config.optim.total_steps and not stopped_by_sentinel(last):
        if world.is_main:
            print(
                f"stopped by a signal after {stopped} of {config.optim.total_steps} updates: go on "
                "with --resume latest",
                file=sys.stderr,
            )
        sys.exit(EXIT_STOPPED)


def open_model(
    config: TrainConfig, world: World, announce: bool = True, experts: Experts = "und"
) -> Bagel:
    """The starting checkpoint (of it, by default, the understanding path) in float32, on this
    process's device.

    Raises:
        UsageError: an attention backend that cannot train on the CPU.
    """
    path, weights = config.model.model_path, config.model.weights
    backend = config.model.attention_backend
    if world.device.type == "cpu" and backend not in ("auto", "sdpa"):
        # FlexAttention has no backward pass on the CPU, flash-attn no kernel at all
        raise UsageError(f"--attention_backend {backend} trains on a GPU only: use sdpa on the CPU")
    model = load_pretrained(path, weights=weights, experts=experts, device=world.device)
    model.attention_backend = backend
    model.set_activation_checkpointing(config.model.activation_checkpointing)
    if announce:
        announce_model(config, model, world)
    return model


def announce_model(config: TrainConfig, model: Bagel, world: World) -> None:
    """Say which weights were opened, and how many of them are trained."""
    if world.is_main:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        opened = find_weights(config.model.model_path, config.model.weights).name
        print(f"opened {opened}: {count:.2f} M trainable parameters", flush=True)


def open_processor(config: TrainConfig, mixture: Mixture) -> Processor:
    """Tokenizer, prompts and image limits of the starting checkpoint; the mixture may set the
    limits.
    """
    folder, limits = config.model.model_path, mixture.config.vit_image_transform_args
    processor = Processor.from_pretrained(folder)
    if limits is not None:
        where = f"{config.data.dataset_config_file}: vit_image_transform_args"
        check_image_limits(limits, folder, where)
    return processor.with_transform(limits)


def open_mixture(config: TrainConfig) -> Mixture:
    """The rows of the run; of those whose visual thoughts are drawn, none are read."""
    file, root = config.data.dataset_config_file, config.data.data_root
    fields = None
    if isinstance(config, OpsdConfig) and config.visual_thoughts.vt_source == "generated":
        read = MixtureConfig.load(file).fields
        fields = dataclasses.replace(read, visual_thoughts=False)
    return load_mixture(file, root, config.data.data_seed, fields)


def open_loader(
    config: TrainConfig, mixture: Mixture, world: World, start_step: int = 0
) -> DataLoader:
    """This rank's rows of each optimizer step from `start_step` on."""
    return loader(
        mixture,
        config.run.global_batch,
        start_step,
        config.optim.total_steps - start_step,
        rank=world.rank,
        world=world.size,
        num_workers=config.data.num_workers,
    )


def open_optimizer(student: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW for what the student trains. After each of its steps the compute weights are those of
    the step, also where they are rounded from masters.

    Raises:
        UsageError: moments in host memory for a sharded student.
    """
    optim = config.optim
    if optim.adam_moments == "host" and FSDP.fsdp_modules(student):
        raise UsageError(
            "--adam_moments host: a run that shards its weights has shards of the moments, too; "
            "use resident on more GPUs, or --num_shard 1"
        )
    optimizer = build_optimizer(
        student.parameters(),
        optim.lr,
        (optim.beta1, optim.beta2),
        optim.eps,
        optim.weight_decay,
        optim.adam_moments,
    )
    if isinstance(student, MasterWeights):
        optimizer.register_step_post_hook(lambda *_: student.publish())
    return optimizer


def open_metrics(config: TrainConfig, world: World, start: Start = FRESH) -> MetricLogger:
    """The metrics of a run that is about to train, and beside them the settings it trains with.

    Not earlier: a run that is refused, or has nothing left to do, leaves those of the run before.
    """
    run = config.run
    if world.is_main:
        save_config(config, f"{run.results_dir}/config.yaml")
    metrics = MetricLogger(
        f"{run.results_dir}/metrics.jsonl",
        total_steps=config.optim.total_steps,
        start_step=start.step,
        log_every=run.log_every,
        rank=world.rank,
        progress=run.progress,
        device=world.device,
        tensorboard_dir=run.tensorboard_dir,
        wandb_project=run.wandb_project,
        config=dataclasses.asdict(config),
    )
    metrics.restore(start.pending)
    return metrics


def open_writer(
    config: TrainConfig,
    model_config: BagelConfig,
    processor: Processor,
    mixture: Mixture,
    world: World,
) -> CheckpointWriter:
    """What saves and resumes the run.

    Raises:
        UsageError: --resume names another run.
    """
    identity = check_resumed(config, mixture, world)
    base = base_weights(config)
    return CheckpointWriter(config, model_config, processor, base, world, identity)


def check_resumed(config: TrainConfig, mixture: Mixture, world: World) -> dict[str, Any]:
    """The identity of the run, which is that of the run it resumes, if any. Collective.

    Raises:
        UsageError: it is another one's.
    """
    identity = run_identity(config, mixture, base_weights(config), world)
    check_same_run(config, identity, world)
    return identity


def open_sentinel(config: OpsdConfig, world: World) -> Sentinel:
    """The sentinel of a run, with what it had seen where that is resumed."""
    start, _ = find_resumable(config)
    # none in a state of an earlier version; it begins with the next look then
    seen = read_trainer(start.folder / STATE).get("sentinel", {}) if start.folder else {}
    seen = {"reported": start.step, **seen}
    setting = Setting(
        config.validation.sentinel,
        config.optim.total_steps,
        config.run.global_batch,
        world.is_main,
    )
    return restored(setting, seen)


def observe_draws(metrics: MetricLogger, rows: list[tuple[int, Drawn]]) -> None:
    """Count what could not be used of this rank's draws, as means per row: records that were passed
    over, and visual thoughts that were left out because they cannot be decoded.
    """
    for _, drawn in rows:
        metrics.observe(skipped_records=drawn.skipped, skipped_vts=drawn.example.skipped_vts)


def base_weights(config: TrainConfig) -> WeightFiles:
    """Where the generation weights of the export come from."""
    return find_weights(config.model.model_path, config.model.weights)
