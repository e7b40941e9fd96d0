"""Processes, device mesh, FSDP HYBRID_SHARD, and the single-device model that rollouts run on.

Model code knows nothing of this file. One process: the plain module, beside float32 masters where
the compute dtype is narrower (train/master.py). Several replicas that do not shard: DDP (FSDP would
silently not reduce there). Otherwise FSDP over a (replicate, shard) mesh.
"""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel as DDP

from modeling.bagel import Bagel
from modeling.config import BagelConfig
from modeling.generation import Workspace
from modeling.pretrained import is_generation_key
from modeling.qwen2_mot import MoTDecoderLayer
from modeling.siglip_navit import SiglipLayer
from train.config import DTYPES, ModelArguments, UsageError
from train.master import MasterWeights, RoundedForward
from train.teacher import WRAPPER_NAMES

# Of collectives over all ranks: sampling, or writing a checkpoint, may keep a rank away from them
# for long, and torch's own limit (10 minutes on GPUs) would end the run.
TIMEOUT = timedelta(hours=2)
# What is gathered, or rounded, at a time. Bagel itself is one, so that the FSDP root owns no
# parameters: a root keeps its own gathered after a forward without backward, and a teacher would
# serve stale ones.
UNITS = (Bagel, MoTDecoderLayer, SiglipLayer)
HEAD_START = 10  # seconds in which a rank that failed is noticed before those that miss it


class LostRankError(RuntimeError):
    """Another process of this run has ended."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    num_shard: int
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def num_replicate(self) -> int:
        return self.size // self.num_shard

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float | Tensor) -> float:
        """Sum over all ranks. Collective."""
        return self.sums(value)[0]

    def sums(self, *values: float | Tensor) -> list[float]:
        """The sum of each value over all ranks, in one all-reduce. Collective."""
        if self.size == 1:
            return [float(value) for value in values]
        totals = [
            torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values
        ]
        stacked = torch.stack(totals)
        dist.all_reduce(stacked)
        return stacked.tolist()

    def max(self, value: float) -> float:
        """Greatest over all ranks. Collective."""
        if self.size == 1:
            return value
        greatest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return float(greatest)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def distributed(model: ModelArguments, num_shard: int, global_batch: int) -> Iterator[World]:
    """Join the processes that torchrun started (or run alone) and leave them at the end.

    Raises:
        UsageError: sizes that do not divide, cuda asked for where there is none, or more processes
            than GPUs.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = _device(model.device)
    shard = num_shard or int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % shard:
        raise UsageError(f"--num_shard {shard} does not divide the {size} processes")
    if global_batch % size:
        raise UsageError(f"--global_batch {global_batch} is not a multiple of the {size} processes")
    dtype = model.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield World(rank, size, shard, device, DTYPES[dtype])
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        time.sleep(HEAD_START)  # torchrun ends us meanwhile, and takes the one that failed for it
        text = " ".join(str(error).split())
        raise LostRankError(
            f"another process has ended, its own message tells why; go on with --resume latest "
            f"(what this one saw: {text})"
        ) from error
    # A rank that fails keeps its connections until it has said why and exits: closing them here
    # would make the others speak first.
    if size > 1:
        # Wrapped modules are cycles that hold process groups; a thread of gloo that is still there
        # when the interpreter ends aborts a run that has succeeded.
        gc.collect()
        dist.barrier()  # gloo may abort a rank whose peers have left already
        dist.destroy_process_group()


def _lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of what happened to another process."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU: use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"no GPU for the process with LOCAL_RANK {local_rank}, torch sees {count}: start at "
            f"most {count} per node (torchrun --nproc_per_node {count}, NPROC_PER_NODE={count} of "
            "the launchers) or use --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def wrap(model: Bagel, world: World, trained: bool = True) -> nn.Module:
    """Spread a float32 model over the processes; its forward runs in the compute dtype.

    Its parameters are float32 (in one process: masters of the weights that are computed with).

    trained: False for a teacher, whose forward needs no weights that stay rounded.
    """
    if world.size == 1:
        narrow = world.compute_dtype != torch.float32
        if narrow and trained:
            return MasterWeights(model, world.compute_dtype)
        if narrow:
            RoundedForward(model, UNITS, world.compute_dtype)
        return _Root(model)
    if world.num_shard == 1:
        narrow = world.compute_dtype if world.compute_dtype != torch.float32 else None
        root = _Root(model, narrow)
        if not trained:  # DDP would keep room for gradients
            return root
        return DDP(root, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(
        world.device.type,
        (world.num_replicate, world.num_shard),
        mesh_dim_names=("replicate", "shard"),
    )
    policy = partial(
        lambda_auto_wrap_policy,
        lambda_fn=lambda m: isinstance(m, UNITS),
    )
    return FSDP(
        _Root(model),  # FSDP casts the gathered weights itself
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=policy,
        use_orig_params=True,
        mixed_precision=_mixed_precision(world),
        device_id=world.device,  # without it FSDP insists on an accelerator
    )


class _Root(nn.Module):
    """Holds the model one level below the sharding root; under autocast, if a dtype is given."""

    def __init__(self, module: Bagel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.module = module
        self.autocast = autocast

    def forward(self, *args, **kwargs):
        if self.autocast is None:
            return self.module(*args, **kwargs)
        with torch.autocast(self.module.device.type, self.autocast):
            return self.module(*args, **kwargs)


def _mixed_precision(world: World) -> MixedPrecision | None:
    if world.compute_dtype == torch.float32:
        return None
    # inputs are cast by the model where it needs to: indices, masks and positions must stay exact
    return MixedPrecision(
        param_dtype=world.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        cast_root_forward_inputs=False,
    )


def full_params(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(released key, full tensor) of every parameter, gathered unit by unit. Collective.

    A tensor is valid only until the next one is asked for.
    """
    units = FSDP.fsdp_modules(model)
    if not units:
        for name, parameter in model.named_parameters():
            yield _released_key(name), parameter
        return
    prefixes = {id(module): name for name, module in model.named_modules()}
    for unit in units:
        with FSDP.summon_full_params(unit, recurse=False, writeback=False):
            nested = [m for m in unit.modules() if isinstance(m, FSDP) and m is not unit]
            elsewhere = {id(p) for m in nested for p in m.parameters()}
            for name, parameter in unit.named_parameters():
                if id(parameter) not in elsewhere:
                    yield _released_key(f"{prefixes[id(unit)]}.{name}"), parameter


def _released_key(name: str) -> str:
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    name = name.removeprefix(".")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def full_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """All parameters on the CPU of rank 0 (an empty dict elsewhere). Collective."""
    state = {}
    for name, parameter in full_params(model):
        if world.is_main:
            state[name] = parameter.detach().to("cpu", copy=True)
    return state


def rollout_model(config: BagelConfig, student: nn.Module, world: World) -> "RolloutCopy":
    """What to sample on: in one process the student's own compute weights, else a copy of them."""
    return StudentItself(student) if world.size == 1 else RolloutCopy(config, world)


class RolloutCopy:
    """A single-device replica in the compute dtype whose storage never moves, and the memory that
    decoding on it uses again and again.

    Sampling on it needs no collective, so ranks may write completions of different lengths.
    """

    def __init__(self, config: BagelConfig, world: World, model: Bagel | None = None) -> None:
        """A copy for `config`, or one that makes use of `model`, whose weights that only drawing
        uses stay as they are.
        """
        if model is None:
            with torch.device(world.device):
                model = Bagel(config, generation_expert=False).to(world.compute_dtype)
            model.vit_pos_embed.reset()
        self.model = model.requires_grad_(False).eval()
        self.workspace = Workspace()
        parameters = model.named_parameters()
        self._targets = {name: p for name, p in parameters if not is_generation_key(name)}

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        """Copy the student's current weights, one gathered unit at a time. Collective."""
        copied = set()
        for name, parameter in full_params(student):
            self._targets[name].copy_(parameter)
            copied.add(name)
        if copied != set(self._targets):
            missing = sorted(set(self._targets) - copied)
            raise RuntimeError(f"the rollout copy missed {len(missing)} parameters: {missing[:3]}")


class StudentItself(RolloutCopy):
    """In the place of a copy where the student is on one device as a whole: the model it trains.

    Nothing to copy, and nothing that could lag behind. Its parameters stay trainable: what runs on
    it does so without gradient.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = student.compute if isinstance(student, MasterWeights) else student.module
        self.workspace = Workspace()

    def refresh(self, student: nn.Module) -> None:
        """Nothing to do: an update of the student is one of this model."""
