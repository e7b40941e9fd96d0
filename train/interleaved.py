"""Rows with pictures to draw: from examples to sequences with latents, noised at random times.

Everything random is keyed by (seed, step, row), so it is the same for every world size.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from data.contexts import (
    ConditionDropout,
    Noising,
    interleaved_pictures,
    interleaved_sequence,
)
from data.example import Example
from data.processor import Processor
from data.streams import stream_seed
from modeling.autoencoder import AutoEncoder
from modeling.drawing import encode, noise_like
from modeling.flow import shifted
from modeling.sequence import Segment
from train.config import TuningArguments


@dataclass(frozen=True)
class Interleaver:
    """What it takes to make interleaved rows."""

    autoencoder: AutoEncoder
    processor: Processor
    patch: int  # latent positions per token and side
    tuning: TuningArguments
    seed: int

    def sequences(self, rows: list[tuple[int, Example]], step: int) -> list[list[Segment]]:
        """One sequence per (global row, example)."""
        latents = self._latents(rows, step)
        return [
            interleaved_sequence(
                example,
                self.processor,
                pictures,
                self.patch,
                self._noisings(pictures[1:], step, row),
                self._dropout(len(pictures), step, row),
            )
            for (row, example), pictures in zip(rows, latents, strict=True)
        ]

    def _latents(self, rows: list[tuple[int, Example]], step: int) -> list[list[Tensor]]:
        """Posterior samples (Z, h, w) of the pictures of each row; equal sizes share a forward."""
        by_size = defaultdict(list)
        pixels = {}
        for place, (row, example) in enumerate(rows):
            for number, picture in enumerate(interleaved_pictures(example, self.processor)):
                pixels[place, number] = self.processor.vae_transform(picture)
                by_size[pixels[place, number].shape].append((place, number, row))
        encoded: dict[tuple[int, int], Tensor] = {}
        config = self.autoencoder.config
        for (_, height, width), members in by_size.items():
            shape = config.z_channels, height // config.downsample, width // config.downsample
            noise = [
                noise_like(shape, stream_seed(self.seed, "vae", step, row, number))
                for _, number, row in members
            ]
            batch = torch.stack([pixels[place, number] for place, number, _ in members])
            grids = encode(self.autoencoder, batch, torch.stack(noise)).cpu()
            encoded |= {member[:2]: grid for member, grid in zip(members, grids, strict=True)}
        return [
            [encoded[place, number] for number in range(1 + len(example.visual_thoughts))]
            for place, (_, example) in enumerate(rows)
        ]

    def _noisings(self, pictures: list[Tensor], step: int, row: int) -> list[list[Noising]]:
        """Logit-normal times, shifted; none where drawing is not learned."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "flow", step, row))
        count = self.tuning.noisings if self.tuning.mse_weight else 0
        points = []
        for picture in pictures:
            times = torch.sigmoid(torch.randn(count, generator=generator))
            times = shifted(times, self.tuning.timestep_shift).tolist()
            noises = torch.randn(count, *picture.shape, generator=generator)
            points.append([Noising(time, n) for time, n in zip(times, noises, strict=True)])
        return points

    def _dropout(self, pictures: int, step: int, row: int) -> ConditionDropout:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "dropout", step, row))
        draws = torch.rand(2 * pictures + 1, generator=generator).tolist()
        tuning = self.tuning
        return ConditionDropout(
            draws[0] < tuning.text_cond_dropout_prob,
            frozenset(i for i in range(pictures) if draws[1 + i] < tuning.vae_cond_dropout_prob),
            frozenset(
                i for i in range(pictures) if draws[1 + pictures + i] < tuning.vit_cond_dropout_prob
            ),
        )
