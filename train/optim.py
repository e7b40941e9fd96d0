"""AdamW, the learning-rate schedule, gradient clipping and the guard against non-finite steps.

The learning rate is a pure function of the update number, so there is no scheduler state to save.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import AdamW

from train.moments import HostAdamW

Moments = Literal["resident", "host"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are the paper's run (App. C)."""

    lr: float = 1e-5
    min_lr: float = 1e-7  # the cosine ends here and stays; not used by schedule="constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 200
    total_steps: int = 1000
    warmup_from_zero: bool = False  # True: the first update has lr 0, as in the public release
    adam_moments: Moments = "resident"  # host: not on the device, for some time per update

    def __post_init__(self):
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"eps={self.eps} must be positive and weight_decay={self.weight_decay} not negative"
            )
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be positive; use inf to only measure"
            )
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}; choose cosine or constant")
        if self.adam_moments not in get_args(Moments):
            raise ValueError(f"adam_moments={self.adam_moments!r}; choose resident or host")
        if self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps}: a run needs at least one update")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and "
                f"total_steps={self.total_steps}; shorten the warm-up or lengthen the run"
            )


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm is NaN or infinite; the weights have not been updated with it."""


def lr_at(step: int, config: OptimConfig) -> float:
    """Learning rate of the update that follows `step` completed updates (0-based).

    Linear warm-up over `warmup_steps` updates, from lr / warmup_steps to lr (or from exactly 0 with
    `warmup_from_zero`), then constant, or half a cosine down to `min_lr` at `total_steps`. Beyond
    that it stays at `min_lr`; a plain cosine would climb again.
    """
    if step < config.warmup_steps:
        return config.lr * (step + (not config.warmup_from_zero)) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = config.total_steps - config.warmup_steps
    progress = min((step - config.warmup_steps) / span, 1.0) if span else 1.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the coming update, in all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(
    params: Iterable[nn.Parameter],
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    moments: Moments = "resident",
) -> AdamW:
    """AdamW over the parameters that require a gradient; fused where all of them are on CUDA.

    On the CPU the fused kernel would save a few milliseconds of a miniature step, but it rounds the
    end of a tensor differently from its middle: results would depend on how weights are cut up.

    Weight decay, if any, applies to every tensor: sharded parameters are flat, so matrices cannot
    be told from norms by their number of dimensions.

    moments: where the moments lie, on the device of the parameters or in host memory; the updates
        are the same. Sharded parameters can only have them on the device.
    """
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient; unfreeze what is to be trained")
    fused = all(p.is_cuda and p.is_floating_point() for p in trainable)
    # fused=None leaves the choice between foreach and a plain loop to torch.
    kind = HostAdamW if moments == "host" else AdamW
    return kind(
        trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused or None
    )


def clip_grad_norm(module: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `module` to a global L2 norm of at most `max_norm`.

    Returns the norm before clipping as a scalar tensor (not synchronised with the host). For an
    FSDP root the norm runs over all shards; every rank of it must take part.
    """
    if isinstance(module, FSDP):
        return module.clip_grad_norm_(max_norm)
    if any(isinstance(child, FSDP) for child in module.modules()):
        raise ValueError(
            f"{type(module).__name__} contains FSDP units but is not one: the norm of this rank's "
            "shards alone would be clipped; pass the FSDP root"
        )
    return nn.utils.clip_grad_norm_(module.parameters(), max_norm)


def check_finite(step: int, **values: float) -> None:
    """Raise `NonFiniteError` naming the step and every value that is NaN or infinite."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name}={value}" for name, value in bad.items())
        raise NonFiniteError(
            f"step {step}: {listed}; the update was not applied. Start again with a lower --lr or "
            "--max_grad_norm (the last folder in --checkpoint_dir, if there is one, is a valid "
            "--model_path), or look at the rows of this step"
        )
