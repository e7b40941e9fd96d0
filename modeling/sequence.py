"""Segments -> PackedBatch: the one packer of training, scoring, prefill and inference.

A text block is `<|im_start|> ids <|im_end|>` (causal), an image block is
`<|vision_start|> patches <|vision_end|>` (full attention inside). Rotary positions: text advances
by its length, all tokens of an image share one position, after which the position advances by 1.

Legend: T packed tokens, N patches, R loss rows, P patch_dim, S samples.
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


Segment = Text | Image


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
    position_ids: Tensor  # (T,) rotary positions
    loss_rows: Tensor  # (R,) places whose hidden state predicts `labels`
    labels: Tensor  # (R,)
    loss_weights: Tensor  # (R,) float32, 1/sqrt(rows of the block), 1 for an end label
    loss_sample: Tensor  # (R,) which sample a loss row belongs to
    image_grids: tuple[tuple[int, int], ...]  # (height, width) in patches, packed order
    samples: tuple[tuple[Split, ...], ...]  # per sample, its attention splits
    next_positions: tuple[int, ...]  # per sample, the rotary position that would follow

    def __len__(self) -> int:
        return len(self.position_ids)

    @property
    def sample_lens(self) -> tuple[int, ...]:
        return tuple(sum(split.length for split in splits) for splits in self.samples)

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
    content = segment.token_ids if isinstance(segment, Text) else segment.patches
    return len(content) + 2


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
    return PackedBatch(
        token_ids=token_ids,
        token_index=rows,
        patches=token_ids.new_empty(0, 0, dtype=torch.float32),
        patch_index=rows[:0],
        position_ids=position_ids,
        loss_rows=rows,
        labels=rows[:0],
        loss_weights=rows[:0].float(),
        loss_sample=rows,
        image_grids=(),
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
        self.position_ids: list[Tensor] = []
        self.loss_rows: list[int] = []
        self.labels: list[int] = []
        self.loss_weights: list[float] = []
        self.loss_sample: list[int] = []
        self.image_grids: list[tuple[int, int]] = []
        self.samples: list[tuple[Split, ...]] = []
        self.next_positions: list[int] = []

    def sample(self, index: int, segments: Sequence[Segment]) -> None:
        splits, position = [], 0
        for segment in segments:
            length = segment_length(segment)
            if isinstance(segment, Text):
                self._text(segment, index)
                self.position_ids.append(torch.arange(position, position + length))
                position += length
                splits.append(Split(length, "causal"))
            else:
                self._image(segment)
                self.position_ids.append(torch.full((length,), position))
                position += 1
                splits.append(Split(length, "full"))
            self.length += length
        self.samples.append(tuple(splits))
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
        if block.end_label is not None:
            self.loss_rows.append(start + n + 1)
            self.labels.append(block.end_label)
            self.loss_weights.append(1.0)
            self.loss_sample.append(sample)

    def _image(self, image: Image) -> None:
        start, n = self.length, len(image.patches)
        self.token_ids += [self.tokens.image_start, self.tokens.image_end]
        self.token_index += [start, start + n + 1]
        self.patches.append(image.patches)
        self.patch_index.append(torch.arange(start + 1, start + n + 1))
        self.image_grids.append((image.height, image.width))

    def build(self) -> PackedBatch:
        def long(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long)

        return PackedBatch(
            token_ids=long(self.token_ids),
            token_index=long(self.token_index),
            patches=torch.cat(self.patches) if self.patches else torch.empty(0, 0),
            patch_index=torch.cat(self.patch_index) if self.patch_index else long([]),
            position_ids=torch.cat(self.position_ids),
            loss_rows=long(self.loss_rows),
            labels=long(self.labels),
            loss_weights=torch.tensor(self.loss_weights, dtype=torch.float32),
            loss_sample=long(self.loss_sample),
            image_grids=tuple(self.image_grids),
            samples=tuple(self.samples),
            next_positions=tuple(self.next_positions),
        )
