"""What a step costs, counted from shapes: parameters, FLOPs, bytes. For the wire see `train.wire`.

Pure arithmetic on a BagelConfig and on attention splits; nothing is allocated or run. A `Work` and
a `Machine` give a floor in seconds; `train.plan` divides it by the share that is reached in
practice. Stages count every token through every layer, as hand counts do: skipping what
nobody reads of the last layer (`wanted`) saves up to 3.5 % of that.

Conventions. A multiply-add is 2 FLOPs. Matrix products are exact. Attention is counted from the
(query, key) pairs that the splits let see each other: a text token sees itself and all before it,
an image token its whole image and all before that; its backward pass counts 2.5 forward passes, as
a fused kernel computes the scores once more. Norms, activations, rotation and softmax are not
counted. Backends that mask a dense square compute all of it.

Legend: D hidden, H heads, K kv-heads, E head_dim, F intermediate, V vocabulary, T completion
tokens, s ranks that share the weights, r replicas.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.sequence import Split

Samples = Sequence[Sequence[Split]]
Recompute = Literal["none", "full"]
Scope = Literal["und", "all"]

BF16, FP32 = 2, 4
ADAMW_BYTES = 28  # per parameter: weight and both moments read and written, gradient read, fp32
EMA_BYTES = 12  # per parameter: average read and written, weight read, fp32
ATTENTION_BACKWARD = 2.5  # forward passes

# The released 7B shape, which needs no download: the understanding encoder and decoder of BAGEL.
FULL_SIZE = BagelConfig(
    llm=LLMConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    vit=ViTConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
    ),
)
KNOWN_CONFIGS = {"ThinkMorph-7B": FULL_SIZE, "BAGEL-7B-MoT": FULL_SIZE}


# ---- machines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One accelerator. Rates are per second, of bfloat16 products and of bytes, and those that a
    plain large product or copy reaches.
    """

    name: str
    memory: float  # bytes
    flops: float
    bandwidth: float
    link: float  # to the other ranks of the node, one direction
    host_link: float = 50e9  # to pinned memory of the host, one direction
    launch: float = 0.0  # seconds per operation, where these are not hidden (eager, CPU)

    @classmethod
    def from_data_sheet(cls, name: str, memory: float, *peaks: float) -> "Machine":
        """With what is usually reached of the vendor's peaks: product, memory, links."""
        reached = [peak * share for peak, share in zip(peaks, (0.8, 0.9, 0.7, 1.0), strict=True)]
        return cls(name, memory, *reached)


# Of the first two, what a plain large product and a copy were seen to reach.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("H200", 141e9, 790e12, 4.3e12, 165e9),
        Machine("H800", 80e9, 660e12, 2.9e12, 165e9),
        Machine.from_data_sheet("H100-80", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        Machine.from_data_sheet("A100-80", 80e9, 312e12, 2.039e12, 300e9, 25e9),
        Machine.from_data_sheet("A100-40", 40e9, 312e12, 1.555e12, 300e9, 25e9),
        Machine.from_data_sheet("L40S-48", 48e9, 362e12, 0.864e12, 32e9, 25e9),
    )
}


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of memory traffic, and operations launched, of some stage."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times, self.launches * times)

    def bound(self, machine: Machine) -> Literal["gemm", "bandwidth"]:
        """What the floor is made of."""
        compute, traffic = self.flops / machine.flops, self.bytes / machine.bandwidth
        return "gemm" if compute >= traffic else "bandwidth"

    def seconds(self, machine: Machine) -> float:
        """The floor: all compute and all traffic overlap, launches do not."""
        busy = max(self.flops / machine.flops, self.bytes / machine.bandwidth)
        return busy + self.launches * machine.launch


# ---- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Trainable values of each part; fixed position tables are constants and not among them."""

    embedding: int
    head: int
    und: int  # decoder layers and final norm, understanding expert
    gen: int  # the same, generation expert
    vit: int
    connector: int
    latent_heads: int  # vae2llm, llm2vae, time embedder
    tables: int  # values of the fixed position table of the image encoder

    @property
    def understanding(self) -> int:
        return self.embedding + self.head + self.und + self.vit + self.connector

    @property
    def everything(self) -> int:
        return self.understanding + self.gen + self.latent_heads

    def of(self, scope: Scope) -> int:
        return self.understanding if scope == "und" else self.everything


def parameters(config: BagelConfig) -> Parameters:
    """Counts of every part, from shapes."""
    D, d = config.llm.hidden_size, config.vit.hidden_size
    trunk = config.llm.num_hidden_layers * sum(decoder_layer(config)) + D
    vit = sum(vision_stem(config)) + config.vit_layers_used * sum(vision_layer(config))
    return Parameters(
        embedding=config.llm.vocab_size * D,
        head=config.llm.vocab_size * D,
        und=trunk,
        gen=trunk,
        vit=vit,
        connector=d * D + D + D * D + D,
        latent_heads=257 * D + (D + 1) * D + (2 * config.latent_dim + 1) * D + config.latent_dim,
        tables=config.vit.patches_per_side**2 * D,
    )


def decoder_layer(config: BagelConfig) -> list[int]:
    """Values of each tensor of one understanding layer."""
    llm = config.llm
    D, F, E = llm.hidden_size, llm.intermediate_size, llm.head_dim
    Q, KV = llm.num_attention_heads * E, llm.num_key_value_heads * E
    attention = [D * Q, Q, D * KV, KV, D * KV, KV, Q * D, E, E]
    return [*attention, D * F, D * F, F * D, D, D]


def vision_layer(config: BagelConfig) -> list[int]:
    """Values of each tensor of one layer of the image encoder."""
    d, f = config.vit.hidden_size, config.vit.intermediate_size
    return [*[d * d, d] * 4, d, d, d * f, f, f * d, d, d, d]


def vision_stem(config: BagelConfig) -> list[int]:
    """Positions, patch embedding and the last norm of the image encoder."""
    d = config.vit.hidden_size
    return [config.vit.patches_per_side**2 * d, config.vit.patch_dim * d, d, d, d]


def _layer_products(llm: LLMConfig) -> tuple[int, int]:
    """Weights of a layer that multiply a token: before attention, and after it."""
    D, F, E = llm.hidden_size, llm.intermediate_size, llm.head_dim
    Q, KV = llm.num_attention_heads * E, llm.num_key_value_heads * E
    return D * Q + 2 * D * KV, Q * D + 3 * D * F


def kv_bytes_per_token(config: BagelConfig, itemsize: int = BF16) -> int:
    """Keys and values of one token in all layers."""
    llm = config.llm
    return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * itemsize


# ---- sequences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of one sample: tokens of the image, of the text around it, of each visual thought
    (VT), and of the completion. The two tokens that frame a block come on top of all but the text.
    """

    image: int
    text: int = 200
    vt: int = 0
    vts: int = 1
    completion: int = 400
    reference: int = 80  # the two prompts around the visual thoughts, about that in Qwen2.5 tokens

    def prompt(self) -> list[Split]:
        return [Split(self.image + 2, "full"), Split(self.text, "causal")]

    def student(self) -> list[Split]:
        return [*self.prompt(), Split(self.completion + 2, "causal")]

    def teacher(self) -> list[Split]:
        intro, transition = self.reference * 2 // 3, self.reference - self.reference * 2 // 3
        thoughts = [Split(self.vt + 2, "full")] * self.vts
        privileged = [Split(intro, "causal"), *thoughts, Split(transition, "causal")]
        return [*self.prompt(), *privileged, Split(self.completion + 2, "causal")]

    @property
    def rows(self) -> int:
        """Rows that are scored: one per completion token and the closing one."""
        return self.completion + 1

    def with_completion(self, tokens: float) -> "Case":
        return dataclasses.replace(self, completion=round(tokens))


CASES = {  # a small, a middle and a large sample
    "S": Case(image=1296, vt=1296, completion=256),
    "M": Case(image=2500, vt=2500),
    "L": Case(image=4900, vt=4900),
}


def length(splits: Sequence[Split]) -> int:
    return sum(split.length for split in splits)


def visible_pairs(splits: Sequence[Split]) -> int:
    """(query, key) pairs of one sample that see each other."""
    pairs = before = hidden = 0
    for split in splits:
        n = split.length
        inside = n * (n + 1) // 2 if split.mode == "causal" else n * n
        pairs += n * (before - hidden) + inside
        before += n
        hidden += n if split.mode == "noise" else 0
    return pairs


# ---- FLOPs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, by what their backward pass takes."""

    layers: float = 0.0  # products of the decoder layers
    last: float = 0.0  # of these, the last product of each layer
    attention: float = 0.0
    vision: float = 0.0  # products of encoder and connector, but for the next
    patches: float = 0.0  # of the patch embedding: pixels take no gradient
    vision_attention: float = 0.0
    head: float = 0.0

    @property
    def products(self) -> float:
        return self.layers + self.vision + self.patches + self.head

    @property
    def forward(self) -> float:
        return self.products + self.attention + self.vision_attention

    @property
    def backward(self) -> float:
        attention = self.attention + self.vision_attention
        return 2 * self.products - self.patches + ATTENTION_BACKWARD * attention

    def recomputed(self, early_stop: bool = True) -> float:
        """What activation checkpointing runs again: the decoder layers.

        torch stops as soon as it has what the backward pass reads, which spares the last product.
        """
        return self.layers + self.attention - (self.last if early_stop else 0)


def vision_flops(config: BagelConfig, patches: Sequence[int]) -> Flops:
    """Encoder and connector on images of so many patches each."""
    vit, D = config.vit, config.llm.hidden_size
    d, n = vit.hidden_size, sum(patches)
    layers = config.vit_layers_used
    products = layers * (4 * d * d + 2 * d * vit.intermediate_size) + d * D + D * D
    return Flops(
        vision=2 * n * products,
        patches=2 * n * vit.patch_dim * d,
        vision_attention=4 * layers * d * sum(p * p for p in patches),
    )


def decoder_flops(
    config: BagelConfig, tokens: int, pairs: int, rows: int = 0, wanted: int | None = None
) -> Flops:
    """Decoder on `tokens` of which `pairs` see each other, and the head on `rows`.

    wanted: tokens whose hidden states are asked for, if not all: the last layer makes keys and
    values of every token, and goes on with these alone.
    """
    llm = config.llm
    before, after = _layer_products(llm)
    n, width = llm.num_hidden_layers, llm.num_attention_heads * llm.head_dim
    finished = n * tokens if wanted is None else (n - 1) * tokens + wanted
    return Flops(
        layers=2 * (n * tokens * before + finished * after),
        last=2 * finished * llm.hidden_size * llm.intermediate_size,
        attention=4 * n * width * pairs,
        head=2 * rows * llm.vocab_size * llm.hidden_size,
    )


def forward_flops(
    config: BagelConfig,
    samples: Samples,
    patches: Sequence[int],
    rows: int = 0,
    wanted: int | None = None,
) -> Flops:
    """The whole model on packed samples with images of so many patches each."""
    tokens, pairs = sum(map(length, samples)), sum(map(visible_pairs, samples))
    decoded = decoder_flops(config, tokens, pairs, rows, wanted)
    seen = vision_flops(config, patches)
    values = zip(dataclasses.astuple(seen), dataclasses.astuple(decoded), strict=True)
    return Flops(*(a + b for a, b in values))


# ---- stages of one sample -----------------------------------------------------------------------


def vision(config: BagelConfig, patches: Sequence[int], itemsize: int = BF16) -> Work:
    p = parameters(config)
    return Work(vision_flops(config, patches).forward, itemsize * (p.vit + p.connector))


def prefill(config: BagelConfig, case: Case, itemsize: int = BF16) -> Work:
    """The decoder on a prompt; the encoder is counted by `vision`."""
    splits = case.prompt()
    flops = decoder_flops(config, length(splits), visible_pairs(splits)).forward
    keys = length(splits) * kv_bytes_per_token(config, itemsize)
    return Work(flops, itemsize * parameters(config).und + keys)


def decode_step(config: BagelConfig, batch: float, context: float, itemsize: int = BF16) -> Work:
    """One token for each of `batch` rows that have `context` tokens on average."""
    p = parameters(config)
    flops = decoder_flops(config, batch, round(batch * (context + 1)), batch).forward
    keys = batch * context * kv_bytes_per_token(config, itemsize)
    return Work(flops, itemsize * (p.und + p.head) + keys)


def student(
    config: BagelConfig,
    case: Case,
    recompute: Recompute = "none",
    early_stop: bool = True,
    itemsize: int = BF16,
) -> Work:
    """Forward and backward of encoder and decoder; the head is counted by `loss_head`."""
    flops = forward_flops(config, [case.student()], [case.image])
    again = flops.recomputed(early_stop) if recompute == "full" else 0
    passes = 4 if recompute == "full" else 3  # over the weights; and one over the gradients
    traffic = (passes * itemsize + FP32) * parameters(config).understanding
    return Work(flops.forward + flops.backward + again, traffic)


def teacher(config: BagelConfig, case: Case, itemsize: int = BF16) -> Work:
    """Forward on the privileged context, the encoder on all images of it included."""
    patches = [case.image, *[case.vt] * case.vts]
    flops = forward_flops(config, [case.teacher()], patches).forward
    return Work(flops, itemsize * parameters(config).understanding)


def loss_head(
    config: BagelConfig,
    rows: int,
    gradient_ids: int | None = None,
    forward_ids: int | None = None,
    itemsize: int = BF16,
) -> Work:
    """Vocabulary projections: the teacher's, and the student's forward and backward.

    forward_ids, gradient_ids: entries that the student is projected on, and those that have a
    gradient; by default all.
    """
    width, V = config.llm.hidden_size, config.llm.vocab_size
    forward = V if forward_ids is None else forward_ids
    gradient = V if gradient_ids is None else gradient_ids
    flops = 2 * rows * width * (V + forward + 2 * gradient)
    return Work(flops, 2 * itemsize * V * width)


def adamw(count: float) -> Work:
    """One update of `count` parameters."""
    return Work(bytes=count * ADAMW_BYTES)


def ema(count: float) -> Work:
    """One update of the average of `count` parameters."""
    return Work(bytes=count * EMA_BYTES)
