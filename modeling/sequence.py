"""Segments -> PackedBatch: the one packer of training, scoring, prefill and inference.

A text block is `<|im_start|> ids <|im_end|>` (causal), an image block is
`<|vision_start|> patches <|vision_end|>` (full attention inside), and so is a block of latents.
Rotary positions: text advances by its length, all tokens of an image share one position, after
which the position advances by 1. Latents that are being learned are seen by nobody else and leave
the position where it is: the picture itself, which follows, stands in their place.

Legend: T packed tokens, N patches, M latent tokens, R loss rows, P patch_dim, C latent_dim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.tokenizer import SpecialTokens

Mode = Literal["causal", "full", "noise"]


@dataclass(frozen=True)
class Text:
    """One text block.

    With `loss`, the rows of the opening token and of every id predict ids + closing token. With
    `end_label`, the row of the closing token predicts that id as well (e.g. an image follows).
    """

    token_ids: tuple[int, ...]
    loss: bool = False
    end_label: int | None = None


@dataclass(frozen=True)
class Image:
    """One image for the understanding encoder: `patches` is (height * width, P) float32, raster
    order.
    """

    patches: Tensor
    height: int  # in patches
    width: int  # in patches

    def __post_init__(self) -> None:
        if self.patches.ndim != 2 or len(self.patches) != self.height * self.width:
            raise ValueError(
                f"patches of shape {tuple(self.patches.shape)} do not form a "
                f"{self.height}x{self.width} grid"
            )


@dataclass(frozen=True)
class Latent:
    """One picture for the generation expert: `tokens` is (height * width, C) float32, raster order.

    With `target`, the velocity of each token at flow time `time` is learned (see
    `modeling.flow.noised`). With `end_label`, the row of the closing token predicts that id.
    """

    tokens: Tensor
    height: int  # in latent tokens
    width: int  # in latent tokens
    time: float = 0.0  # flow time of `tokens`: 0 is a picture, 1 is noise
    target: Tensor | None = None
    end_label: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or len(self.tokens) != self.height * self.width:
            raise ValueError(
                f"latents of shape {tuple(self.tokens.shape)} do not form a "
                f"{self.height}x{self.width} grid"
            )
        if self.target is not None and self.target.shape != self.tokens.shape:
            raise ValueError(
                f"target of shape {tuple(self.target.shape)} for latents of shape "
                f"{tuple(self.tokens.shape)}"
            )


@dataclass(frozen=True)
class Gap:
    """A picture that was left out: no token of it, but the position goes on as if it were there."""


Segment = Text | Image | Latent | Gap


@dataclass(frozen=True)
class Split:
    """A run of tokens of one sample with one attention mode."""

    length: int
    mode: Mode


@dataclass(frozen=True)
class PackedBatch:
    """Samples laid end to end. Index tensors are int64, `samples` stays on the host."""

    token_ids: Tensor  # (n_text,)
    token_index: Tensor  # (n_text,) places of the text tokens in the packed sequence
    patches: Tensor  # (N, P)
    patch_index: Tensor  # (N,) places of the patches in the packed sequence
    latents: Tensor  # (M, C)
    latent_index: Tensor  # (M,) places of the latent tokens in the packed sequence
    times: Tensor  # (M,) float32 flow time of each latent token
    targets: Tensor  # (F, C) velocities to learn
    flow_rows: Tensor  # (F,) places of the latent tokens they belong to
    position_ids: Tensor  # (T,) rotary positions
    loss_rows: Tensor  # (R,) places whose hidden state predicts `labels`
    labels: Tensor  # (R,)
    loss_weights: Tensor  # (R,) float32, 1/sqrt(rows of the block), 1 for an end label
    loss_sample: Tensor  # (R,) which sample a loss row belongs to
    sample_rows: tuple[int, ...]  # per sample, its loss rows
    image_grids: tuple[tuple[int, int], ...]  # (height, width) in patches, packed order
    latent_grids: tuple[tuple[int, int], ...]  # (height, width) in latent tokens, packed order
    samples: tuple[tuple[Split, ...], ...]  # per sample, its attention splits
    next_positions: tuple[int, ...]  # per sample, the rotary position that would follow

    def __len__(self) -> int:
        return len(self.position_ids)

    @property
    def sample_lens(self) -> tuple[int, ...]:
        return tuple(sum(split.length for split in splits) for splits in self.samples)

    def after(self, positions: Tensor) -> "PackedBatch":
        """The batch as the continuation of cache rows: sample r begins at positions[r], (B,)."""
        lengths = torch.tensor(self.sample_lens, device=positions.device)
        start = torch.repeat_interleave(positions, lengths, output_size=len(self))
        return dataclasses.replace(self, position_ids=self.position_ids + start)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Move every tensor; a no-op on the same device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def segment_length(segment: Segment) -> int:
    """Tokens of a block, its two framing tokens included."""
    if isinstance(segment, Gap):
        return 0
    if isinstance(segment, Text):
        return len(segment.token_ids) + 2
    return segment.height * segment.width + 2


def pack(samples: Sequence[Sequence[Segment]], tokens: SpecialTokens) -> PackedBatch:
    """Lay out samples, each a list of segments, end to end; positions restart at 0 per sample."""
    builder = _Builder(tokens)
    for index, segments in enumerate(samples):
        builder.sample(index, segments)
    return builder.build()


def decode_batch(token_ids: Tensor, position_ids: Tensor) -> PackedBatch:
    """One bare token per cache row, each of them a loss row: the input of a decoding step.

    Args:
        token_ids, position_ids: (B,) on the device of the model; nothing is copied or waited for.
    """
    rows = torch.arange(len(token_ids), device=token_ids.device)
    none = token_ids.new_empty(0, 0, dtype=torch.float32)
    return PackedBatch(
        token_ids=token_ids,
        token_index=rows,
        patches=none,
        patch_index=rows[:0],
        latents=none,
        latent_index=rows[:0],
        times=none.flatten(),
        targets=none,
        flow_rows=rows[:0],
        position_ids=position_ids,
        loss_rows=rows,
        labels=rows[:0],
        loss_weights=rows[:0].float(),
        loss_sample=rows,
        sample_rows=(1,) * len(token_ids),
        image_grids=(),
        latent_grids=(),
        samples=((Split(1, "causal"),),) * len(token_ids),
        next_positions=(),
    )


class _Builder:
    """Grows the lists of a PackedBatch block by block."""

    def __init__(self, tokens: SpecialTokens) -> None:
        self.tokens = tokens
        self.length = 0
        self.token_ids: list[int] = []
        self.token_index: list[int] = []
        self.patches: list[Tensor] = []
        self.patch_index: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.latent_index: list[Tensor] = []
        self.times: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.flow_rows: list[Tensor] = []
        self.position_ids: list[Tensor] = []
        self.loss_rows: list[int] = []
        self.labels: list[int] = []
        self.loss_weights: list[float] = []
        self.loss_sample: list[int] = []
        self.sample_rows: list[int] = []
        self.image_grids: list[tuple[int, int]] = []
        self.latent_grids: list[tuple[int, int]] = []
        self.samples: list[tuple[Split, ...]] = []
        self.next_positions: list[int] = []

    def sample(self, index: int, segments: Sequence[Segment]) -> None:
        splits, position, rows = [], 0, len(self.loss_rows)
        for segment in segments:
            length = segment_length(segment)
            if isinstance(segment, Gap):
                position += 1
                continue
            if isinstance(segment, Text):
                self._text(segment, index)
                self.position_ids.append(torch.arange(position, position + length))
                position += length
                splits.append(Split(length, "causal"))
            else:
                learned = isinstance(segment, Latent) and segment.target is not None
                self._picture(segment, index)
                self.position_ids.append(torch.full((length,), position))
                position += 0 if learned else 1
                splits.append(Split(length, "noise" if learned else "full"))
            self.length += length
        self.samples.append(tuple(splits))
        self.sample_rows.append(len(self.loss_rows) - rows)
        self.next_positions.append(position)

    def _text(self, block: Text, sample: int) -> None:
        start, n = self.length, len(block.token_ids)
        self.token_ids += [self.tokens.bos, *block.token_ids, self.tokens.eos]
        self.token_index += range(start, start + n + 2)
        if block.loss:
            self.loss_rows += range(start, start + n + 1)
            self.labels += [*block.token_ids, self.tokens.eos]
            self.loss_weights += [(n + 1) ** -0.5] * (n + 1)
            self.loss_sample += [sample] * (n + 1)
        self._end_label(block, start + n + 1, sample)

    def _picture(self, block: Image | Latent, sample: int) -> None:
        start, n = self.length, block.height * block.width
        self.token_ids += [self.tokens.image_start, self.tokens.image_end]
        self.token_index += [start, start + n + 1]
        index = torch.arange(start + 1, start + n + 1)
        if isinstance(block, Image):
            self.patches.append(block.patches)
            self.patch_index.append(index)
            self.image_grids.append((block.height, block.width))
            return
        self.latents.append(block.tokens)
        self.latent_index.append(index)
        self.times.append(torch.full((n,), block.time))
        self.latent_grids.append((block.height, block.width))
        if block.target is not None:
            self.targets.append(block.target)
            self.flow_rows.append(index)
        self._end_label(block, start + n + 1, sample)

    def _end_label(self, block: Text | Latent, row: int, sample: int) -> None:
        if block.end_label is not None:
            self.loss_rows.append(row)
            self.labels.append(block.end_label)
            self.loss_weights.append(1.0)
            self.loss_sample.append(sample)

    def build(self) -> PackedBatch:
        def long(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long)

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.empty(0, 0)

        def indices(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else long([])

        return PackedBatch(
            token_ids=long(self.token_ids),
            token_index=long(self.token_index),
            patches=joined(self.patches),
            patch_index=indices(self.patch_index),
            latents=joined(self.latents),
            latent_index=indices(self.latent_index),
            times=torch.cat(self.times) if self.times else torch.empty(0),
            targets=joined(self.targets),
            flow_rows=indices(self.flow_rows),
            position_ids=indices(self.position_ids),
            loss_rows=long(self.loss_rows),
            labels=long(self.labels),
            loss_weights=torch.tensor(self.loss_weights, dtype=torch.float32),
            loss_sample=long(self.loss_sample),
            sample_rows=tuple(self.sample_rows),
            image_grids=tuple(self.image_grids),
            latent_grids=tuple(self.latent_grids),
            samples=tuple(self.samples),
            next_positions=tuple(self.next_positions),
        )
