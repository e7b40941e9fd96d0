"""Models with random weights, prompts and lengths of the CPU suite, and what this machine can do.

The closing token is never written, so that as many tokens are written as the budgets say.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks import measure
from modeling import generation
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.sequence import Segment, Text
from tests.tiny_model import TOKENS, FakeTokenizer, randomise_

SIZES = {  # of a decoder: vocabulary, hidden, intermediate, layers, heads, kv-heads
    "tiny": LLMConfig(1024, 128, 256, 4, 4, 2),
    "small": LLMConfig(8192, 512, 1408, 8, 8, 2),
    "deep": LLMConfig(1024, 128, 256, 28, 4, 2),
}
CONTEXT = {"tiny": 256, "small": 1024, "deep": 64}  # tokens of a prompt
VIT = ViTConfig(32, 48, 3, 2, patch_size=4, image_size=64)
TOKENIZER = FakeTokenizer()
DECODING_DTYPE = torch.bfloat16  # of real weights, and of what is known of the release


@functools.lru_cache(maxsize=2)
def models(size: str, dtype: torch.dtype = torch.float32) -> tuple[Bagel, Bagel]:
    """A model with the generation expert, for the baseline, and its understanding path."""
    config = BagelConfig(SIZES[size], VIT)
    whole = randomise_(Bagel(config)).eval()
    head = whole.language_model.lm_head.weight.data
    head.mul_(3)
    head[TOKENS.eos] = 0  # far below the best logit, and rarely worth a draw: never written
    ours = Bagel(config, generation_expert=False).eval()
    state = whole.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    return tuple(model.requires_grad_(False).to(dtype) for model in (whole, ours))


def prompt(length: int, seed: int = 0) -> list[Segment]:
    """A text of `length` tokens, framing included."""
    stream = torch.Generator().manual_seed(seed)
    return [Text(tuple(torch.randint(16, 144, (length - 2,), generator=stream).tolist()))]


def ragged_budgets(rows: int, mean: float, cap: int, seed: int) -> list[int]:
    """Lognormal lengths with sigma 0.5."""
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    lengths = mean * torch.exp(0.5 * noise - 0.125)
    return lengths.round().clamp(1, cap).int().tolist()


@contextmanager
def accelerator_habits() -> Iterator[None]:
    """The decoding loop looks at its rows, and drops them, as seldom as on an accelerator."""
    with mock.patch.object(generation, "_habits", lambda _: generation.ACCELERATOR_HABITS):
        yield


def mismatches(first: Sequence[int], second: Sequence[int]) -> float:
    """Places where two token lists differ, those that only one has included."""
    differing = sum(a != b for a, b in zip(first, second, strict=False))
    return float(differing + abs(len(first) - len(second)))


@functools.cache
def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s and FLOP/s of this machine."""
    return measure.read_rate(), measure.gemm_rate(dtype=dtype)


def decode_floor(model: Bagel, rows: int, slots: int) -> float:
    """Seconds that a decoding step takes at least where weights do not fit the caches."""
    llm, read = model.config.llm, model.language_model
    weights = sum(p.numel() for p in read.model.layers.parameters()) + read.lm_head.weight.numel()
    cached = rows * slots * 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
    bandwidth, flops = rates(model.dtype)
    size = model.dtype.itemsize
    return max((weights + cached) * size / bandwidth, 2 * weights * rows / flops)
