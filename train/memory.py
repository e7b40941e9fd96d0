"""Peak memory of a training step, counted from shapes: what stays on each GPU, and what each stage
adds. Nothing is allocated or measured; `train.plan` prints it.

Counted is the longest completion. The CUDA context, fragmentation and libraries come on top: the
nominal size that is compared against is some 6 % below what a card has, which is to hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from modeling.attention import Backend
from modeling.config import BagelConfig
from modeling.generation import ACCELERATOR_HABITS, CPU_HABITS
from modeling.sequence import Split
from train import cost
from train.config import UsageError
from train.cost import BF16, FP32, Case, Machine
from train.losses import CHUNK_ROWS
from train.moments import BUCKET, SLOTS
from train.optim import Moments
from train.teacher import TeacherMode
from train.wire import fsdp_units

Mode = Literal["full", "sft", "interleaved", "inference"]
Items = dict[str, float]  # what -> bytes

NODE = 8  # GPUs that share fast links
FRAMING = 5  # slots of a row's cache beside context and visible tokens: see `decoding_room`
LOGIT_BYTES = 16  # per logit of a chunk (bf16, fp32 copies); assumed


@dataclass(frozen=True)
class Setup:
    """A run: model, machines and knobs. The knobs are named as the trainer's flags."""

    config: BagelConfig
    machine: Machine
    world: int = 1
    mode: Mode = "full"
    itemsize: int = BF16  # of the compute dtype
    num_shard: int = 0
    global_batch: int = 16
    micro_batch: int = 1
    activation_checkpointing: bool = False
    attention_backend: Backend = "auto"
    adam_moments: Moments = "resident"
    teacher_mode: TeacherMode = "ema"
    case: Case = cost.CASES["M"]
    max_new: int = 1024
    max_forward_tokens: int = 10240
    inter_node: float = 50e9  # bytes per second and GPU, one direction

    def __post_init__(self) -> None:
        if self.world % self.shard:
            divisors = [str(d) for d in range(1, self.world + 1) if self.world % d == 0]
            raise UsageError(
                f"--num_shard {self.num_shard} does not divide the {self.world} GPUs: "
                f"use one of {', '.join(divisors)}"
            )
        if self.mode == "inference" and self.world > 1:
            raise UsageError(f"--mode inference is of one process: one GPU, not {self.world}")
        if self.global_batch % self.world:
            more = -(-self.global_batch // self.world) * self.world
            raise UsageError(
                f"--global_batch {self.global_batch} is not a multiple of the {self.world} GPUs: "
                f"every rank needs as many rows; give {more}, or other --gpus"
            )
        if self.adam_moments == "host" and self.strategy == "fsdp":
            raise UsageError(
                "--adam_moments host: a run that shards its weights shards the moments, too; use "
                "resident on more GPUs, or --num_shard 1"
            )
        if self.machine.name == "cpu" and self.attention_backend not in ("auto", "sdpa"):
            raise UsageError(
                f"--attention_backend {self.attention_backend} trains on a GPU only: use sdpa"
            )
        if self.mode == "full" and self._room < 1:
            raise UsageError(
                f"--max_forward_tokens {self.max_forward_tokens} leaves no completion after a "
                f"teacher context of {self.max_forward_tokens - self._room} tokens: lower "
                "--vt_tokens, --vts or --image_tokens"
            )

    @property
    def shard(self) -> int:
        return self.num_shard or min(self.world, NODE)

    @property
    def replicas(self) -> int:
        return self.world // self.shard

    @property
    def strategy(self) -> Literal["alone", "ddp", "fsdp"]:
        if self.world == 1:
            return "alone"
        return "ddp" if self.shard == 1 else "fsdp"

    @property
    def split(self) -> int:
        """Ranks over which weights, gradients and moments are divided."""
        return self.shard if self.strategy == "fsdp" else 1

    @property
    def rows(self) -> int:
        """Rows of a step on each rank."""
        return self.global_batch // self.world

    @property
    def micro_rows(self) -> int:
        return min(self.micro_batch, self.rows)

    @property
    def micro_steps(self) -> int:
        return -(-self.rows // self.micro_batch)

    @property
    def trained(self) -> int:
        return cost.parameters(self.config).of("all" if self.mode == "interleaved" else "und")

    @property
    def averages(self) -> bool:
        """Whether there is a teacher with weights of its own."""
        return self.mode == "full" and self.teacher_mode != "self"

    @property
    def dense(self) -> bool:
        """Whether attention takes a mask, and keys and values repeated for each head."""
        by_default = self.attention_backend == "auto" and self.machine.name == "cpu"
        return by_default or self.attention_backend == "sdpa"

    @property
    def _room(self) -> int:
        return self.max_forward_tokens - cost.length(self.case.with_completion(0).teacher())

    @property
    def longest(self) -> Case:
        """The sample with the longest completion that the cap lets through."""
        if self.mode == "full":
            return self.case.with_completion(min(self.max_new, self._room))
        return self.case.with_completion(self.max_new) if self.mode == "inference" else self.case


# ---- what stays ---------------------------------------------------------------------------------


def static_memory(s: Setup) -> Items:
    """What stays on each GPU from step to step. There are no gradients while nobody learns; DDP
    keeps their buckets.
    """
    whole, share = s.trained, s.trained / s.split
    tables = FP32 * cost.parameters(s.config).tables
    if s.mode == "inference":
        return {"weights": s.itemsize * whole, "position tables": tables}
    held = {"weights, float32": FP32 * share}
    copies = 1 + s.averages
    if s.strategy == "alone" and s.itemsize < FP32:
        also = ", also for rollouts" if s.mode == "full" else ""
        held[f"compute weights{also}"] = s.itemsize * whole
    if s.strategy == "ddp":
        held["gradients, float32"] = FP32 * whole
    if s.averages:
        held[f"{s.teacher_mode} teacher, float32"] = FP32 * share
    if s.mode == "full":
        held["KV cache of rollouts"] = kv_cache(s)
        if s.strategy != "alone":
            held["rollout copy"] = s.itemsize * whole
            copies += 1
    if s.adam_moments == "resident":
        held["Adam moments"] = 2 * FP32 * share
    return held | {"position tables": copies * tables}


def kv_cache(s: Setup) -> float:
    """Bytes for all rows of a rank: context and completion, rounded up as the workspace does."""
    habits = CPU_HABITS if s.machine.name == "cpu" else ACCELERATOR_HABITS
    slots = cost.length(s.case.prompt()) + s.max_new + FRAMING
    slots = -(-slots // habits.extent_step) * habits.extent_step
    return s.rows * slots * cost.kv_bytes_per_token(s.config, s.itemsize)


def host_memory(s: Setup) -> float:
    """Bytes of pinned host memory per rank: a block for each moment, which torch rounds up to a
    power of two.
    """
    if s.adam_moments == "resident" or s.mode == "inference":
        return 0.0
    return 2.0 * 2 ** (FP32 * s.trained - 1).bit_length()


# ---- what comes and goes ------------------------------------------------------------------------


def activation_bytes(config: BagelConfig, itemsize: int, dense: bool = False) -> tuple[int, int]:
    """What the backward pass reads, per token of a decoder layer and per patch of an encoder layer.

    Decoder: two norms that compute in float32 (a fused one keeps less), queries and keys before and
    after norm and rotation, attention output, and the MLP's gate, its SiLU, up and their product.
    Encoder likewise, with LayerNorm and one GELU. `dense`: as on the CPU, keys and values repeated
    for each head, the output copied, and norms that are not fused.
    """
    llm, vit, a = config.llm, config.vit, itemsize
    D, E = llm.hidden_size, llm.head_dim
    Q, KV = llm.num_attention_heads * E, llm.num_key_value_heads * E
    norm = 8 + a if dense else 4 + 2 * a
    norms = 2 * D * norm
    attention = (Q + KV) * (norm + a)
    if dense:
        attention += 3 * Q * a - 2 * KV * a
    statistics = FP32 * (2 * llm.num_attention_heads + llm.num_key_value_heads + 4)
    decoder = norms + attention + statistics + 4 * a * llm.intermediate_size
    encoder = 9 * a * vit.hidden_size + 2 * a * vit.intermediate_size + 16
    return decoder, encoder


def student_activations(s: Setup) -> float:
    """Bytes that live at the end of the student's forward pass, of one micro batch."""
    per_token, per_patch = activation_bytes(s.config, s.itemsize, s.dense)
    tokens, patches, drawn = sequence(s)
    llm, D = s.config.llm, s.config.llm.hidden_size
    if drawn:  # both experts' parts are gathered and scattered in every layer
        per_token += 8 * s.itemsize * D
    layer = tokens * per_token
    ends = s.itemsize * (6 * D * tokens + 3 * D * patches)  # embeddings, connector, last norm
    if s.dense:
        square = tokens**2 / s.micro_rows
        ends += square  # the mask, of bytes
        if s.machine.name != "cpu":  # with grouped heads no fused kernel may take a mask: assumed
            layer += s.itemsize * llm.num_attention_heads * square
    decoder = layer * llm.num_hidden_layers
    if s.activation_checkpointing:
        decoder = tokens * s.itemsize * D * llm.num_hidden_layers + layer
    return decoder + patches * per_patch * s.config.vit_layers_used + ends


def sequence(s: Setup) -> tuple[int, int, int]:
    """Tokens, patches and, of the tokens, latents, of the largest micro batch that is trained on.

    Interleaved rows hold every picture as latents (16 pixels a side) and as patches (14), and what
    is drawn once more, noised.
    """
    case, rows = s.longest, s.micro_rows
    if s.mode != "interleaved":
        return rows * cost.length(case.student()), rows * case.image, 0
    drawn = rows * case.vts * case.vt
    patches = rows * case.image + drawn
    latents = round((patches + drawn) * (14 / 16) ** 2)
    return rows * (case.text + case.completion) + patches + latents, patches, latents


def forward_memory(s: Setup, splits: Sequence[Split], rows: int) -> float:
    """Bytes of a forward without gradient on `rows` such sequences: residual, norm, MLP; and the
    mask, where the kernel takes one.
    """
    llm, tokens = s.config.llm, cost.length(splits)
    width = 3 * llm.intermediate_size + 8 * llm.hidden_size
    return rows * (tokens * width * s.itemsize + s.dense * tokens**2)


def memory(s: Setup) -> dict[str, Items]:
    """Stage -> what is on each GPU at its peak."""
    held = static_memory(s)
    prefill = {"prefill": forward_memory(s, s.case.prompt(), s.rows)}
    if s.mode == "inference":
        return {"load": held, "generate": held | {"KV cache": kv_cache(s)} | prefill}
    stages = {"load": _loading(s, held)}
    if s.mode == "full":
        stages["rollout"] = held | prefill
    learning = held | {"gradients, float32": FP32 * s.trained / s.split}
    layer = sum(cost.decoder_layer(s.config)) * (2 if s.mode == "interleaved" else 1)
    root = fsdp_units(s.config, s.split)[0]  # the unit with embedding and head
    narrow, sharded = s.itemsize < FP32, s.strategy == "fsdp"
    units = {"gathered units": s.itemsize * (root + 2 * layer)} if sharded else {}
    if s.mode == "full":
        forward = {"forward": forward_memory(s, s.longest.teacher(), s.micro_rows)}
        if s.averages and narrow and s.strategy == "alone":
            forward["rounded"] = s.itemsize * (root + layer)
        stages["teacher"] = learning | units | forward
    if s.strategy == "ddp" and narrow:
        units = {"autocast copies": s.itemsize * s.trained}
    # the loss makes the gradient of the head, which waits for the backward pass
    head = cost.parameters(s.config).head * (FP32 if s.strategy == "ddp" else s.itemsize)
    active = student_activations(s)
    in_flight = head + s.itemsize * layer
    if sharded:  # the unit with embedding and head is reduced last, in float32
        in_flight = max(in_flight, (s.itemsize + FP32) * root - active)
    logits = CHUNK_ROWS * s.config.llm.vocab_size * LOGIT_BYTES
    forward = learning | units | {"activations": active}
    stages["loss"] = forward | {"head gradient": head, "logits of a chunk": logits}
    stages["student"] = forward | {"gradients in flight": in_flight}
    stages["optimizer"] = dict(learning)
    if s.adam_moments == "host":
        slots = min(SLOTS * BUCKET, s.trained)
        stages["optimizer"]["Adam moments on their way"] = 2 * FP32 * slots
    stages["checkpoint"] = held | ({"one unit, float32": FP32 * root} if sharded else {})
    return stages


def _loading(s: Setup, held: Items) -> Items:
    """The network is opened whole in float32 on every rank, then split; the teacher likewise. Cache
    and moments come later, and the rollout copy after both were split.
    """
    later = {"KV cache of rollouts", "Adam moments"}
    if s.strategy != "fsdp":
        return {name: size for name, size in held.items() if name not in later}
    root = fsdp_units(s.config, s.split)[0]
    split = {name: size for name, size in held.items() if name not in later | {"rollout copy"}}
    return split | {"one network whole": FP32 * s.trained, "one unit, float32": FP32 * root}


def total(items: Items) -> float:
    return sum(items.values())


def peak(s: Setup) -> tuple[str, float]:
    """The stage that needs most, and how much."""
    return max(((name, total(items)) for name, items in memory(s).items()), key=lambda p: p[1])


def fits(s: Setup) -> bool:
    return peak(s)[1] <= s.machine.memory
