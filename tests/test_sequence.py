"""Packing: a hand-worked layout, loss rows, positions, and invariants over random samples."""

import random

import pytest
import torch

from modeling.sequence import Image, Split, Text, decode_batch, pack, segment_length
from modeling.tokenizer import SpecialTokens

TOKENS = SpecialTokens(bos=1, eos=2, image_start=3, image_end=4)


def image(height, width, value=0.0):
    return Image(torch.full((height * width, 5), value), height, width)


def test_a_layout_by_hand():
    first = [Text((10, 11)), image(1, 2, 7.0), Text((12,), loss=True)]
    second = [Text((), loss=True, end_label=9)]
    batch = pack([first, second], TOKENS)
    assert batch.token_ids.tolist() == [1, 10, 11, 2, 3, 4, 1, 12, 2, 1, 2]
    assert batch.token_index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert batch.patch_index.tolist() == [5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 0, 1]
    assert batch.loss_rows.tolist() == [8, 9, 11, 12]
    assert batch.labels.tolist() == [12, 2, 2, 9]
    assert batch.loss_weights.tolist() == pytest.approx([2**-0.5, 2**-0.5, 1.0, 1.0])
    assert batch.loss_sample.tolist() == [0, 0, 1, 1]
    assert batch.image_grids == ((1, 2),)
    assert batch.samples == (
        (Split(4, "causal"), Split(4, "full"), Split(3, "causal")),
        (Split(2, "causal"),),
    )
    assert batch.sample_lens == (11, 2) and len(batch) == 13
    assert batch.next_positions == (8, 2)


@pytest.mark.parametrize("seed", range(4))
def test_invariants_of_random_packs(seed):
    rng = random.Random(seed)
    samples = []
    for _ in range(4):
        segments = [
            image(rng.randint(1, 3), rng.randint(1, 3))
            if rng.random() < 0.4
            else Text(tuple(rng.choices(range(10, 90), k=rng.randint(0, 6))), rng.random() < 0.5)
            for _ in range(rng.randint(1, 5))
        ]
        samples.append(segments)
    batch = pack(samples, TOKENS)
    lengths = [sum(map(segment_length, segments)) for segments in samples]
    assert list(batch.sample_lens) == lengths and len(batch) == sum(lengths)
    # text and patches tile the sequence exactly
    places = torch.cat([batch.token_index, batch.patch_index]).sort().values
    assert torch.equal(places, torch.arange(len(batch)))
    # a loss row's label is the token that follows it
    at = dict(zip(batch.token_index.tolist(), batch.token_ids.tolist(), strict=True))
    for row, label in zip(batch.loss_rows.tolist(), batch.labels.tolist(), strict=True):
        assert at[row + 1] == label
    # packing is concatenation of the samples packed alone
    alone = [pack([segments], TOKENS) for segments in samples]
    for name in ("token_ids", "position_ids", "labels", "loss_weights"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(b, name) for b in alone])), name
    assert batch.next_positions == tuple(b.next_positions[0] for b in alone)


def test_image_grid_must_hold_its_patches():
    with pytest.raises(ValueError, match=r"\(6, 5\) do not form a 2x2 grid"):
        Image(torch.zeros(6, 5), 2, 2)


def test_decode_batch_is_one_token_per_row():
    batch = decode_batch(torch.tensor([7, 8]), torch.tensor([20, 3]))
    assert batch.sample_lens == (1, 1) and batch.position_ids.tolist() == [20, 3]
    assert batch.loss_rows.tolist() == [0, 1] and batch.token_index.tolist() == [0, 1]


def test_moving_keeps_host_fields():
    batch = pack([[Text((5,), loss=True), image(1, 1)]], TOKENS)
    moved = batch.to("meta")
    assert moved.token_ids.is_meta and moved.patches.is_meta
    assert moved.samples == batch.samples and moved.image_grids == ((1, 1),)
