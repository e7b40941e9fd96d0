"""What all golden checks share: the folder, comparisons, and the table of checks.

A check yields one `Result` per compared quantity. Differences are maxima taken in float64;
tolerances are those stated for the reference numbers, never widened to make a check pass.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from modeling.sequence import Image
from modeling.tokenizer import SpecialTokens

EXACT = 0.0
FEATURES = 1e-5  # image encoder, connector, fixed embeddings
HIDDEN = 3e-5  # decoder hidden states and logits
LOSS = 1e-4  # cross-entropy values
GRADIENT = 1e-4  # relative
JSD = 1e-6  # relative
JSD_GRADIENT = 1e-5  # relative
CACHE = 2e-5  # cached keys and values
VAE = 2e-5  # latents and pictures
LATENT = 2e-4  # latents that were drawn


@dataclass(frozen=True)
class Result:
    """Largest difference of one compared quantity."""

    name: str
    difference: float
    tolerance: float
    unit: str = "abs"  # abs, rel, or count (of differing entries)

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # false for nan


@dataclass(frozen=True)
class Absent:
    """A quantity that could not be compared here, and why."""

    name: str
    reason: str
    ok: bool = True


@dataclass(frozen=True)
class Check:
    """`run` needs all of `files` in one folder."""

    name: str
    files: tuple[str, ...]
    run: Callable[["Golden"], Iterator["Result | Absent"]]


CHECKS: list[Check] = []


def check(name: str, *files: str) -> Callable:
    """Register a function Golden -> results under `name`."""

    def register(function: Callable[["Golden"], Iterator[Result]]) -> Callable:
        CHECKS.append(Check(name, files, function))
        return function

    return register


class Golden:
    """One flat folder of stored numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, files: Iterable[str]) -> bool:
        return all((self.path / file).is_file() for file in files)

    def json(self, name: str) -> Any:
        return json.loads((self.path / f"{name}.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config")

    @property
    def tokens(self) -> SpecialTokens:
        ids = self.config["tokens"]
        names = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")
        return SpecialTokens(*(ids[name] for name in names))

    def model(self, visual_gen: bool = False) -> Bagel:
        """A fresh model with the stored weights; the fixed tables are computed, not loaded."""
        bagel = self.config["bagel"]
        config = BagelConfig(
            llm=_pick(LLMConfig, self.config["llm"]),
            vit=_pick(ViTConfig, self.config["vit"]),
            vit_select_layer=self.config["vit_select_layer"],
            interpolate_pos=bagel["interpolate_pos"],
            latent_patch_size=bagel["latent_patch_size"],
            latent_channels=self.config["vae"]["z_channels"],
            max_latent_size=bagel["max_latent_size"],
        )
        model = Bagel(config, visual_gen=visual_gen)
        wanted = model.state_dict().keys()
        model.load_state_dict({k: v for k, v in self.tensors("model").items() if k in wanted})
        for name, module in model.named_children():
            if name.endswith("pos_embed"):
                module.reset()
        return model

    def autoencoder(self) -> AutoEncoder:
        """The stored VAE."""
        model = AutoEncoder(_pick(VAEConfig, self.config["vae"]))
        model.load_state_dict(self.tensors("ae"))
        return model


def _pick(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def max_abs(actual: Any, expected: Any) -> float:
    """Largest |actual - expected|; inf for other shapes, nan stays nan."""
    actual, expected = _doubles(actual), _doubles(expected)
    if actual.shape != expected.shape:
        return math.inf
    return float((actual - expected).abs().max()) if actual.numel() else 0.0


def max_rel(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude."""
    difference, size = max_abs(actual, expected), float(_doubles(expected).abs().max())
    return difference / size if size else difference


def mismatches(actual: Any, expected: Any) -> float:
    """How many entries differ; inf for other shapes."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    if actual.shape != expected.shape:
        return math.inf
    return float((actual != expected).sum())


def _doubles(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().double()


def exact(name: str, pairs: Iterable[tuple[Any, Any]]) -> Result:
    return Result(name, worst(mismatches(a, b) for a, b in pairs), EXACT, "count")


def close(name: str, tolerance: float, pairs: Iterable[tuple[Any, Any]]) -> Result:
    return Result(name, worst(max_abs(a, b) for a, b in pairs), tolerance)


def relative(name: str, tolerance: float, pairs: Iterable[tuple[Any, Any]]) -> Result:
    return Result(name, worst(max_rel(a, b) for a, b in pairs), tolerance, "rel")


def worst(differences: Iterable[float]) -> float:
    """The largest one, where nan is worse than anything. Nothing compared at all is a miss."""
    values = list(differences)
    if not values or any(math.isnan(value) for value in values):
        return math.nan
    return max(values)


def to_image(pixels: Tensor, patch: int) -> Image:
    """(3, H, W) -> image segment; written out here so that the checks do not lean on `data`."""
    channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    grid = pixels.reshape(channels, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
    return Image(grid.reshape(rows * columns, -1), rows, columns)


def gradient_results(
    name: str, model: Bagel, norms: dict[str, float | None], stored: dict[str, Tensor]
) -> Iterator[Result]:
    """Gradient norms of every parameter, and full gradients where they are stored.

    A parameter that did not run (None here) has gradient zero. Norms far below the rounding of the
    total (a key bias without rotary positions has gradient exactly zero in exact arithmetic) are
    noise on both sides: there the norm has to be as small as that.
    """
    grads = {n: p.grad for n, p in model.named_parameters()}
    total = math.sqrt(sum(norm**2 for norm in norms.values() if norm))
    noise = 1e-6 * total
    differences, unexpected = [], [n for n in grads if n not in norms]
    for key, expected in norms.items():
        grad = grads.get(key)
        actual = 0.0 if grad is None else float(grad.double().norm())
        if expected is None:
            unexpected += [key] if actual else []
        elif expected == 0.0:
            differences.append(math.inf if actual else 0.0)
        elif expected < noise:
            differences.append(0.0 if actual < noise else math.inf)
        else:
            differences.append(abs(actual - expected) / expected)
    yield Result(f"{name}.gradient_keys", float(len(unexpected)), EXACT, "count")
    yield Result(f"{name}.gradient_norms", worst(differences), GRADIENT, "rel")
    if not stored:
        return
    zero_like = {key: torch.zeros_like(value) for key, value in stored.items()}
    yield relative(
        f"{name}.gradients",
        GRADIENT,
        (
            (grads[key] if grads.get(key) is not None else zero_like[key], value)
            for key, value in stored.items()
        ),
    )
