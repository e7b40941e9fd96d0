"""G17 and G18: drawing a picture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import measure, plain
from benchmarks.full_size import (
    MACHINE,
    NEVER,
    SCALES,
    Scale,
    Settings,
    build,
    median_seconds,
    student_prompt,
)
from benchmarks.gates import Check, Gate, at_least
from modeling import generation
from modeling.bagel import Bagel
from modeling.drawing import DrawingParams, draw, latent_segment, noise_like
from modeling.flow import timesteps
from modeling.generation import SamplingParams, Workspace, decode, decoding_room, extend, open_cache
from tests.tiny_model import TOKENS
from train import cost


def drawing_part(settings: Settings) -> list[Gate]:
    """A picture in 50 steps with guidance, and how much slower it makes an answer."""
    scale, device = SCALES[settings.scale], settings.device
    model = build(scale.config, device, settings.dtype, whole=True, draws=True)
    side, patch = scale.picture, scale.config.latent_patch_size
    channels = scale.config.latent_dim // patch**2
    noise = noise_like((1, channels, side * patch, side * patch), seed=0)
    prompt = student_prompt(scale)
    clean = latent_segment(torch.zeros(channels, side * patch, side * patch), patch)
    shown = [clean, *prompt]  # the context of a picture has its latents as well
    contexts = [shown, shown[:-1], prompt[1:]]
    caches = [open_cache(model, [context], TOKENS, 0) for context in contexts]
    params = DrawingParams(num_timesteps=50 if settings.scale == "full" else 5)

    def ours() -> Tensor:
        return draw(model, *caches, noise, params, TOKENS)

    def one_context_at_a_time() -> Tensor:
        """As the release does: each context of guidance in a forward of its own."""
        return plain.draw(model, caches, noise, params, TOKENS)

    found, expected = ours(), one_context_at_a_time()
    apart = float((found - expected).norm() / (expected - noise.to(expected)).norm())
    timing = measure.paired(
        lambda: one_context_at_a_time,
        lambda: ours,
        max(2, settings.repeats // 2),
        warmup=0,
        device=device,
    )
    flops = _drawing_flops(scale, params, [cache.extent for cache in caches])
    text_only, interleaved = (
        _answer(model, scale, settings, tokens) for tokens in scale.answers[::-1]
    )
    ratio = (interleaved + timing.ours_s) / text_only
    return [
        at_least(
            "G17",
            "TF/s of a drawing with guidance, share of the machine's",
            100 * flops / timing.ours_s / MACHINE.flops,
            "%",
            50,
            65,
            checks=(Check("drawing, relative", apart, 0.05),),
            detail={"seconds": timing.ours_s, "flops": flops},
        ),
        at_least(
            "G17", "the same, plain / ours", timing.ratio, "x", 1.15, 1.6, spread=timing.spread
        ),
        at_least(
            "G18",
            f"latency: a drawing and {scale.answers[0]} tokens over {scale.answers[1]} tokens",
            ratio,
            "x",
            None,
            None,
            detail={"text_only_s": text_only, "interleaved_s": interleaved + timing.ours_s}
            | {"note": "not aimed at: faster text makes it larger"},
        ),
    ]


def _answer(model: Bagel, scale: Scale, settings: Settings, tokens: int) -> float:
    """Seconds of a text answer after one prompt, its prefill included."""
    workspace, prompt = Workspace(), [student_prompt(scale)]
    params = SamplingParams(tokens, temperature=0.0, max_image_skips=0)

    def answer() -> None:
        length = sum(map(generation.segment_length, prompt[0]))
        cache = workspace.cache(model, 1, length + decoding_room(model, params, tokens))
        extend(model, cache, prompt, TOKENS)
        decode(model, cache, NEVER, params, workspace=workspace)

    return median_seconds(answer, settings)


def _drawing_flops(scale: Scale, params: DrawingParams, extents: Sequence[int]) -> float:
    """Of all steps: a query of latents over each of the contexts that guidance compares."""
    tokens = scale.picture**2 + 2
    times = timesteps(params.num_timesteps, params.timestep_shift)[:-1].tolist()
    total = 0.0
    for t in times:
        for extent in extents[: 1 + sum(params.guidance.branches(t))]:
            pairs = tokens * (extent + tokens)
            total += cost.decoder_flops(scale.config, tokens, pairs).forward
    return total
