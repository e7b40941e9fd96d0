"""The three teachers: the student itself, its exponential moving average, or a frozen copy.

Each has `.module`, the network to run without gradient, and `.update(student)`, to be called once
after every optimizer update.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel as DDP

TeacherMode = Literal["self", "ema", "fixed"]

# What sharding and activation checkpointing insert into parameter names.
WRAPPER_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class SelfTeacher:
    """The current student under the teacher's context; shares its storage, never lags behind."""

    def __init__(self, student: nn.Module):
        self.module = student

    def update(self, student: nn.Module) -> None:
        """Nothing to do: the module is the student."""


class FixedTeacher:
    """A copy of the initial student that never changes."""

    def __init__(self, module: nn.Module):
        self.module = module.requires_grad_(False)

    def update(self, student: nn.Module) -> None:
        """Nothing to do: the teacher stays where training began."""


class EMATeacher:
    """teacher <- decay * teacher + (1 - decay) * student after each update, in float32.

    Teacher and student must be built and sharded alike: parameters are paired by name. Under FSDP
    each rank averages its own shard (possibly of size zero), which needs no communication.
    Parameters the student does not train are left as they are.

    A sharded teacher must not keep parameters in its FSDP root. The root stays gathered after a
    forward without backward and does not gather again, so it would go on serving the values of
    the first forward; `FSDP(FSDP(model))` has a root without parameters and is free of this.
    """

    def __init__(self, module: nn.Module, decay: float = 0.995):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} is outside [0, 1); use a fixed teacher for 1")
        stale = _parameters_of_sharded_root(module)
        if stale:
            raise ValueError(
                f"the FSDP root of the EMA teacher owns {len(stale)} parameters, e.g. {stale[0]}, "
                "whose gathered copy would never see an update; wrap it once more: FSDP(teacher)"
            )
        self.module = module.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        for name, average, current in paired_parameters(self.module, student):
            if not current.requires_grad:
                continue
            if torch.finfo(average.dtype).bits < 32:
                raise TypeError(
                    f"{name} of the EMA teacher is {average.dtype}: steps of 1 - decay = "
                    f"{1 - self.decay:.2g} would be rounded away; keep its parameters in float32"
                )
            average.lerp_(current.to(average), 1 - self.decay)


Teacher = SelfTeacher | EMATeacher | FixedTeacher


def build_teacher(
    mode: TeacherMode,
    student: nn.Module,
    copy_fn: Callable[[nn.Module], nn.Module],
    decay: float = 0.995,
) -> Teacher:
    """The teacher for `mode`. `copy_fn(student)` returns an equal module, wrapped the same way.

    Teacher and student start equal in every mode; the paper's is "ema" with decay 0.995.
    """
    if mode == "self":
        return SelfTeacher(student)
    if mode == "ema":
        return EMATeacher(copy_fn(student), decay)
    if mode == "fixed":
        return FixedTeacher(copy_fn(student))
    raise ValueError(f"teacher_mode={mode!r}; choose self, ema or fixed")


def paired_parameters(
    first: nn.Module, second: nn.Module
) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, parameter, parameter) of two modules of the same structure; ValueError otherwise."""
    ours, theirs = _parameters_by_name(first), _parameters_by_name(second)
    if ours.keys() != theirs.keys():
        differing = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"teacher and student differ in {len(differing)} parameters, e.g. {differing[0]}; "
            "build and shard both in the same way"
        )
    for name, ours_p in ours.items():
        if ours_p.shape != theirs[name].shape:
            raise ValueError(
                f"{name} is {tuple(ours_p.shape)} in the teacher and {tuple(theirs[name].shape)} "
                "in the student; build and shard both in the same way"
            )
    return [(name, ours[name], theirs[name]) for name in ours]


@torch.no_grad()
def squared_distance(teacher: nn.Module, student: nn.Module) -> tuple[Tensor, int]:
    """Sum of squared differences of the parameters on this rank, a float64 scalar, and how many
    parameters these are. Nothing is communicated or read back.
    """
    pairs = paired_parameters(teacher, student)
    squares = [(a - b.to(a)).square().sum(dtype=torch.float64) for _, a, b in pairs]
    return torch.stack(squares).sum(), sum(a.numel() for _, a, _ in pairs)


def _parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    if isinstance(module, DDP):  # a teacher has no use for it
        module = module.module
    for name, parameter in module.named_parameters():
        for wrapper in WRAPPER_NAMES:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named


def _parameters_of_sharded_root(module: nn.Module) -> list[str]:
    """Names of the parameters that an FSDP root shards itself; none for any other module."""
    if not isinstance(module, FSDP) or module.sharding_strategy == ShardingStrategy.NO_SHARD:
        return []
    units = [unit for unit in module.modules() if isinstance(unit, FSDP) and unit is not module]
    nested = {id(parameter) for unit in units for parameter in unit.parameters()}
    named = _parameters_by_name(module)
    return [name for name, parameter in named.items() if id(parameter) not in nested]
