"""Command line of the trainers: flat flags over frozen dataclasses, presets, defaults = the paper's
run.

A flag is a field name (`--jsd_beta 0.5`); booleans take a value (`--noise_vt True`). `--preset
FILE` changes defaults (section of the entry point in a yaml file), flags given on the command line
win.

    python -m train.config opsd|sft [--flag value ...]     # only checks the flags
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from modeling.attention import Backend
from modeling.generation import SamplingParams
from modeling.pretrained import Weights
from train.losses import JSDConfig
from train.optim import OptimConfig
from train.sentinel import Policy
from train.teacher import TeacherMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK_ZERO_HEAD_START = 5  # seconds to report a bad flag; ranks do not finish importing together


class UsageError(ValueError):
    """A flag or preset value that cannot be used; shown without a traceback."""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelArguments:
    """Which weights to start from and how to run them."""

    model_path: str = _help("checkpoint folder to start from", "models/ThinkMorph-7B")
    weights: Weights = _help("weights of that folder: auto, student or ema", "auto")
    device: Literal["auto", "cpu", "cuda"] = _help("auto = cuda where there is a GPU", "auto")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = _help(
        "of forward passes; auto = bfloat16 on cuda, float32 on cpu", "auto"
    )
    attention_backend: Backend = _help("sdpa, flex, flash; auto = flex on cuda", "auto")
    activation_checkpointing: bool = _help("recompute decoder layers in backward", False)


@dataclass(frozen=True)
class DataArguments:
    """Which records, in which order."""

    dataset_config_file: str = _help("mixture yaml", "data/configs/visual_opsd.yaml")
    data_root: str | None = _help("folder of the data sets; default VISUAL_OPSD_DATA_ROOT", None)
    data_seed: int = _help("order of the records", 42)
    num_workers: int = _help("data loading processes per rank", 4)


@dataclass(frozen=True)
class RunArguments:
    """Where results go, batch sizes, sharding, logging."""

    preset: str | None = _help("yaml that changes defaults, e.g. data/configs/mini.yaml", None)
    results_dir: str = _help("metrics and resolved config", "results/run")
    checkpoint_dir: str = _help("checkpoints are written here", "checkpoints/run")
    overwrite: bool = _help("remove the checkpoints of an earlier run from there", False)
    resume: str | None = _help("go on from a checkpoint: latest, auto or its folder", None)
    global_seed: int = _help("sampling and noise", 4396)
    global_batch: int = _help("trajectories per optimizer step, over all ranks", 16)
    micro_batch: int = _help("trajectories per forward", 1)
    num_shard: int = _help("ranks that share one copy of the weights; 0 = those of a node", 0)
    save_every: int = _help("steps between checkpoints; the last step is always saved", 500)
    save_state: bool = _help("with what --resume needs, 16 bytes per parameter", True)
    keep_last: int = _help("checkpoints that stay, besides the best; 0 = all", 0)
    save_dtype: Literal["bfloat16", "float32"] = _help("of exported weights", "bfloat16")
    log_every: int = _help("steps between metric lines", 10)
    progress: bool = _help("show a progress bar", True)
    tensorboard_dir: str | None = _help("also log there", None)
    wandb_project: str | None = _help("also log to this project", None)

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_last < 0:
            raise UsageError(f"--keep_last must be 0 (all) or more, got {self.keep_last}")
        if self.num_shard < 0:
            raise UsageError(f"--num_shard must be 0 (automatic) or more, got {self.num_shard}")


@dataclass(frozen=True)
class DistillArguments:
    """The distillation objective (section 2.3 of the paper) and the teacher."""

    teacher_mode: TeacherMode = _help("ema, self or fixed", "ema")
    ema_decay: float = _help("of the EMA teacher, per update", 0.995)
    noise_vt: bool = _help("control: Gaussian noise in place of the teacher's images", False)
    jsd_weight: float = _help("weight of the divergence", 1.0)
    jsd_beta: float = _help("teacher's share of the mixture; 0.5 is symmetric", 0.5)
    jsd_temperature: float = _help("softmax temperature of both sides", 1.0)
    jsd_top_k: int = _help("teacher entries kept per token; 0 = all", 256)
    jsd_top_k_mode: Literal["renorm", "tail", "none"] = _help("what happens to the rest", "renorm")
    jsd_token_clip: float = _help("limit of a term in nats; <= 0 = off", 0.05)
    jsd_clip_mode: Literal["entry", "token", "off"] = _help("what the limit applies to", "entry")
    jsd_loss_kind: Literal["jsd", "tinker"] = _help("tinker = reverse-KL policy loss", "jsd")
    ce_weight: float = _help("weight of cross-entropy on the sampled tokens", 0.0)
    launch_gates: bool = _help("stop at the start if scoring is not exact", True)

    def __post_init__(self) -> None:
        if self.jsd_weight < 0 or self.ce_weight < 0 or self.jsd_weight + self.ce_weight == 0:
            raise UsageError(
                f"--jsd_weight {self.jsd_weight} and --ce_weight {self.ce_weight} must be >= 0 and "
                "not both 0"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise UsageError(
                f"--ema_decay {self.ema_decay} is outside [0, 1); --teacher_mode fixed stays put"
            )
        self.jsd  # noqa: B018  validates

    @property
    def jsd(self) -> JSDConfig:
        return JSDConfig(
            beta=self.jsd_beta,
            top_k=self.jsd_top_k,
            top_k_mode=self.jsd_top_k_mode,
            token_clip=self.jsd_token_clip,
            clip_mode=self.jsd_clip_mode,
            temperature=self.jsd_temperature,
        )


@dataclass(frozen=True)
class SamplingArguments:
    """On-policy sampling and the cap on forward tokens."""

    sample_max_new_tokens: int = _help("completion budget, over all rounds", 1024)
    sample_temperature: float = _help("0 = greedy", 1.0)
    sample_max_image_skips: int = _help("rounds that may end in an image request", 1)
    max_forward_tokens: int = _help("cap on teacher context + completion", 10240)
    min_completion: int = _help("least budget; visual thoughts are shrunk to leave it", 128)

    def __post_init__(self) -> None:
        self.params  # noqa: B018  validates
        if self.sample_max_image_skips < 0:
            raise UsageError(
                f"--sample_max_image_skips must be 0 or more, got {self.sample_max_image_skips}"
            )
        if not 1 <= self.min_completion <= self.sample_max_new_tokens:
            raise UsageError(
                f"--min_completion {self.min_completion} must lie between 1 and "
                f"--sample_max_new_tokens {self.sample_max_new_tokens}"
            )

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            self.sample_max_new_tokens, self.sample_temperature, self.sample_max_image_skips
        )


@dataclass(frozen=True)
class ValidationArguments:
    """Validation during training, for which the released data has no split; and the sentinel."""

    validate_every: int = _help("steps between validations, also at the end; 0 = none", 0)
    validation_samples: int = _help("rows of the validation split, of each source", 50)
    sentinel: Policy = _help(
        "off, warn, lower_lr, stop_and_keep_best: on signs of a collapse", "warn"
    )

    def __post_init__(self) -> None:
        if self.validate_every < 0:
            raise UsageError(f"--validate_every must be 0 (none) or more: {self.validate_every}")
        if self.validation_samples < 1:
            raise UsageError(f"--validation_samples must be 1 or more: {self.validation_samples}")
        if self.sentinel == "stop_and_keep_best" and self.validate_every == 0:
            raise UsageError(
                "--sentinel stop_and_keep_best has no best to keep with --validate_every 0: "
                "validate, or choose warn or lower_lr"
            )


@dataclass(frozen=True)
class VisualThoughtArguments:
    """Where the teacher's visual thoughts come from, and how it draws its own."""

    vt_source: Literal["dataset", "generated"] = _help(
        "the record's, or drawn by the current teacher", "dataset"
    )
    vt_rounds: int = _help("pictures it may draw per row", 1)
    vt_max_think_tokens: int = _help("tokens of the thought before a picture", 1000)
    vt_num_timesteps: int = _help("grid points from noise to picture", 50)
    vt_timestep_shift: float = _help("moves the flow times towards noise", 3.0)
    vt_cfg_text_scale: float = _help("guidance by text; 1 = no guidance", 3.0)
    vt_cfg_img_scale: float = _help("guidance by images; 1 = without", 1.5)

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("max_think_tokens", 1), ("num_timesteps", 2)):
            if (value := getattr(self, f"vt_{name}")) < least:
                raise UsageError(f"--vt_{name} must be at least {least}, got {value}")
        if self.vt_timestep_shift <= 0:
            raise UsageError(f"--vt_timestep_shift must be above 0, got {self.vt_timestep_shift}")


@dataclass(frozen=True)
class TuningArguments:
    """Fine-tuning: what is trained, on which part of interleaved rows, and how it is weighted."""

    visual_gen: bool = _help("train the generation expert and the latent heads too", False)
    freeze_und: bool = _help("train nothing but these", False)
    ce_weight: float = _help("weight of cross-entropy; 0 = off, the default of train.opsd", 1.0)
    mse_weight: float = _help("weight of the velocity's error; 0 = do not learn to draw", 1.0)
    ce_loss_reweighting: bool = _help("blocks count by the root of their length", False)
    noisings: int = _help("times each visual thought is noised per visit", 1)
    timestep_shift: float = _help("moves the flow times of training towards noise", 1.0)
    text_cond_dropout_prob: float = _help("share of rows without question", 0.1)
    vae_cond_dropout_prob: float = _help("share of pictures without latents", 0.3)
    vit_cond_dropout_prob: float = _help("share of pictures without patches", 0.3)
    max_num_tokens: int = _help("rows share a forward up to this; 0 = micro_batch decides", 0)

    def __post_init__(self) -> None:
        if self.freeze_und and not self.visual_gen:
            raise UsageError("--freeze_und True leaves nothing to train without --visual_gen True")
        for name in ("ce_weight", "mse_weight", "max_num_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.ce_weight + self.mse_weight * self.visual_gen == 0:
            raise UsageError(
                "--ce_weight 0 leaves no loss without --visual_gen True and an --mse_weight"
            )
        if self.noisings < 1 or self.timestep_shift <= 0:
            raise UsageError(
                f"--noisings {self.noisings} must be 1 or more and --timestep_shift "
                f"{self.timestep_shift} above 0"
            )
        for part in ("text", "vae", "vit"):
            value = getattr(self, f"{part}_cond_dropout_prob")
            if not 0 <= value <= 1:
                raise UsageError(f"--{part}_cond_dropout_prob {value} is not in [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """What both trainers are told."""

    model: ModelArguments
    data: DataArguments
    optim: OptimConfig
    run: RunArguments


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Everything `train.sft` is told."""

    tuning: TuningArguments


@dataclass(frozen=True)
class OpsdConfig(TrainConfig):
    """Everything `train.opsd` is told."""

    distill: DistillArguments
    sampling: SamplingArguments
    validation: ValidationArguments
    visual_thoughts: VisualThoughtArguments

    def __post_init__(self) -> None:
        if self.distill.noise_vt and self.visual_thoughts.vt_source == "generated":
            raise UsageError(
                "--noise_vt True puts noise in the place of the visual thoughts: drawing them "
                "first (--vt_source generated) would be for nothing"
            )


SFT_DEFAULTS = {  # the paper's text-only SFT baseline, where it differs from OPSD
    "model_path": "models/BAGEL-7B-MoT",
    "dataset_config_file": "data/configs/text_reasoning.yaml",
    "total_steps": 2000,
}


def parse_opsd(argv: Sequence[str] | None = None) -> OpsdConfig:
    """Command line -> OpsdConfig. Exits with a one-line message on a bad flag."""
    return _parse(OpsdConfig, "train.opsd", "opsd", {}, argv)


def parse_sft(argv: Sequence[str] | None = None) -> SftConfig:
    """Command line -> SftConfig. Exits with a one-line message on a bad flag."""
    return _parse(SftConfig, "train.sft", "sft", SFT_DEFAULTS, argv)


def _parse(
    cls: type, module: str, section: str, defaults: dict[str, Any], argv: Sequence[str] | None
) -> Any:
    parts = {f.name: f.type for f in dataclasses.fields(cls)}
    parser = _RankZeroParser(
        list(parts.values()),
        prog=f"python -m {module}",
        usage=f"python -m {module} [--flag value ...]  (--help lists the flags)",
        description=cls.__doc__,
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if known.preset:
            parser.set_defaults(**read_preset(known.preset, section, _flag_types(parts)))
        return cls(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))
    except ValueError as error:  # values that argparse lets through
        parser.error(str(error))


class _RankZeroParser(HfArgumentParser):
    """All ranks read the same command line; one of them says what there is to say."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)) != 0:
            time.sleep(RANK_ZERO_HEAD_START)  # the first rank that fails takes the others along
            sys.exit(2)
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            super().print_help(file)


def _flag_types(parts: dict[str, type]) -> dict[str, Any]:
    return {name: hint for part in parts.values() for name, hint in get_type_hints(part).items()}


def read_preset(path: str | Path, section: str, known: dict[str, Any]) -> dict[str, Any]:
    """The defaults that a preset sets for one entry point; `known` is flag -> type.

    Raises:
        UsageError: no such file or section, a key that is not a flag, or a value it cannot take.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--preset {file}: no such file; presets lie in data/configs/")
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"--preset {file} is not yaml: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get(section), dict):
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else tree
        raise UsageError(f"--preset {file} has no section {section!r} (has: {found})")
    values = tree[section]
    unknown = ", ".join(sorted(map(str, set(values) - set(known))))
    if unknown:
        raise UsageError(f"--preset {file}: {unknown} in {section!r} are not flags")
    where = f"--preset {file}"
    return {name: _preset_value(where, name, value, known[name]) for name, value in values.items()}


def _preset_value(where: str, name: str, value: Any, wanted: Any) -> Any:
    """The value as the flag's type; argparse does not look at defaults, so it is checked here."""
    if get_origin(wanted) is Literal:
        converted = value if value in get_args(wanted) else None
        expected = f"one of {', '.join(get_args(wanted))}"
    elif wanted is float:
        converted, expected = _as_float(value), "a number"
    else:
        kind = wanted if wanted in (bool, int) else str  # the rest is str or str | None
        converted, expected = value if type(value) is kind else None, f"of type {kind.__name__}"
    if converted is None:
        raise UsageError(f"{where}: {name}: {value!r} is not {expected}")
    return converted


def _as_float(value: Any) -> float | None:
    """A number, also one that yaml reads as text (1e-5 without a point); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write the resolved configuration next to the results."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
