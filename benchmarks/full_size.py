"""Sizes, random models and samples of the GPU suite: the 7B, or the same in small."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks import gates, measure
from benchmarks.models import TOKENIZER
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, ViTConfig
from modeling.generation import Rollout, Round
from modeling.sequence import Image, Segment, Text
from modeling.tokenizer import SpecialTokens
from tests.tiny_model import TOKENS
from train import cost
from train.divergence import JSDConfig
from train.rollout import Prompt, Trajectory


@dataclass(frozen=True)
class Settings(gates.Settings):
    """What is measured, and where."""

    scale: str = "full"
    device: torch.device = torch.device("cuda")
    dtype: torch.dtype = torch.bfloat16


JSD = JSDConfig()
ENDLESS = SpecialTokens(TOKENS.bos, -1, -1, -1)  # no token closes a round: lengths are the budgets
NEVER = SimpleNamespace(special=ENDLESS, decode=TOKENIZER.decode)


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurements. Tokens of images are patches."""

    config: BagelConfig
    sizes: tuple[tuple[int, int], ...]  # grids of problem images: small, middle, large
    text: int  # tokens of the question
    context: int  # cached tokens per row when decoding
    steps: int  # decoded tokens that are timed
    widths: tuple[int, int, int, int]  # rows decoded together
    growth: tuple[int, int]  # completion lengths whose times are compared
    completion: int  # of the samples that are scored
    cap: int  # of sampled completions
    plain_rows: int  # samples that the baseline does, for all
    loss_rows: tuple[int, int]
    padded: int  # length to which the release pads a packed sequence
    picture: int  # side of a drawn picture, in latent tokens
    answers: tuple[int, int]  # tokens of an interleaved and of a text-only answer


FULL = Scale(
    config=cost.FULL_SIZE,
    sizes=((36, 36), (50, 50), (70, 70)),
    text=198,
    context=2700,
    steps=64,
    widths=(1, 8, 16, 32),
    growth=(256, 1024),
    completion=400,
    cap=1024,
    plain_rows=4,
    loss_rows=(512, 1024),
    padded=16_384,
    picture=64,
    answers=(452, 201),
)
TINY = Scale(
    config=BagelConfig(
        LLMConfig(1024, 64, 96, 3, 4, 2),
        ViTConfig(32, 48, 3, 2, patch_size=4, image_size=64),
        max_latent_size=8,
    ),
    sizes=((3, 3), (4, 5), (6, 6)),
    text=14,
    context=40,
    steps=6,
    widths=(1, 2, 3, 4),
    growth=(8, 32),
    completion=12,
    cap=24,
    plain_rows=2,
    loss_rows=(64, 128),
    padded=256,
    picture=4,
    answers=(12, 6),
)
SCALES = {"full": FULL, "tiny": TINY}
MACHINE = cost.MACHINES["H200"]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(
    config: BagelConfig, device: torch.device, dtype: torch.dtype, whole: bool, draws: bool = False
) -> Bagel:
    """A model with random weights, made where it stays; its closing token is never the best one."""
    torch.manual_seed(0)
    with torch.device(device), _default(dtype):
        model = Bagel(config, generation_expert=whole, visual_gen=draws).eval()
    for table in (m for m in model.modules() if hasattr(m, "pos_embed")):
        table.reset()
    model.language_model.lm_head.weight.data[TOKENS.eos] = 0
    return model


def understanding_of(whole: Bagel) -> Bagel:
    """The understanding path of a model, made of the very same parameters."""
    with torch.device("meta"):
        part = Bagel(whole.config, generation_expert=False)
    state = whole.state_dict()
    part.load_state_dict({key: state[key] for key in part.state_dict()}, assign=True)
    part.vit_pos_embed = whole.vit_pos_embed
    return part.eval()


def picture(config: BagelConfig, grid: tuple[int, int], seed: int) -> Image:
    stream = torch.Generator().manual_seed(seed)
    height, width = grid
    patches = torch.randn(height * width, config.vit.patch_dim, generator=stream)
    return Image(patches, height, width)


def words(length: int, seed: int) -> Text:
    stream = torch.Generator().manual_seed(seed)
    return Text(tuple(torch.randint(16, 400, (length,), generator=stream).tolist()))


def student_prompt(scale: Scale, size: int = 1, seed: int = 0) -> list[Segment]:
    image = picture(scale.config, scale.sizes[size], seed)
    return [image, words(scale.text, seed)]


def teacher_prompt(scale: Scale, vts: int = 1, size: int = 1, seed: int = 0) -> list[Segment]:
    drawn = [picture(scale.config, scale.sizes[size], 100 + seed + i) for i in range(vts)]
    return [*student_prompt(scale, size, seed), words(50, seed + 1), *drawn, words(26, seed + 2)]


def trajectory(scale: Scale, tokens: int, vts: int = 1, row: int = 0, size: int = 1) -> Trajectory:
    """A sample of the middle size, with a completion that nobody wrote."""
    written = words(tokens, 1000 + row).token_ids
    student, teacher = student_prompt(scale, size, row), teacher_prompt(scale, vts, size, row)
    rollout = Rollout((Round(written, "eos", (0.0,) * (tokens + 1)),))
    return Trajectory(Prompt(row, student, teacher, tokens), rollout)


def case(scale: Scale, tokens: int | None = None, vts: int = 1, size: int = 1) -> cost.Case:
    """What `train.cost` counts for such a sample."""
    height, width = scale.sizes[size]
    image = height * width
    return cost.Case(
        image=image,
        text=scale.text + 2,
        vt=image,
        vts=vts,
        completion=scale.completion if tokens is None else tokens,
        reference=80,
    )


def percent(floor: float, seconds: float) -> float:
    return 100 * floor / seconds


def median_seconds(work: Callable[[], None], settings: Settings, warmup: int = 2) -> float:
    times = [measure.seconds(work, settings.device) for _ in range(warmup + settings.repeats)]
    return measure.quartiles(times[warmup:])[1]
