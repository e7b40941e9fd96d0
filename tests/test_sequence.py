"""Packing: a hand-worked layout, loss rows, positions, and invariants over random samples."""

import random

import pytest
import torch

from modeling.sequence import Gap, Image, Latent, Split, Text, decode_batch, pack, segment_length
from modeling.tokenizer import SpecialTokens

TOKENS = SpecialTokens(bos=1, eos=2, image_start=3, image_end=4)


def image(height, width, value=0.0):
    return Image(torch.full((height * width, 5), value), height, width)


def latent(height, width, value=0.0, time=None, end_label=None):
    """Channels of `value`; with `time`, the velocity -`value` is learned."""
    tokens = torch.full((height * width, 3), value)
    if time is None:
        return Latent(tokens, height, width, end_label=end_label)
    return Latent(tokens, height, width, time, -tokens, end_label)


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


def test_a_layout_with_latents_by_hand():
    """A picture noised twice, then the picture itself; after it patches, a gap and a text."""
    first = [
        Text((10,)),
        *(latent(1, 2, 7.0, time=0.5), latent(1, 2, 8.0, time=0.25)),
        latent(1, 2, 9.0, end_label=77),
        *(image(1, 1), Gap()),
        Text((11,), loss=True),
    ]
    second = [Gap(), latent(1, 1, 5.0, time=0.75, end_label=78)]
    batch = pack([first, second], TOKENS)
    pictures = [3] * 4 + [3] * 4 + [3] * 4 + [4] * 3  # only the last two move on
    assert batch.position_ids.tolist() == [0, 1, 2, *pictures, 6, 7, 8, 1, 1, 1]
    assert batch.samples == (
        (
            Split(3, "causal"),
            *[Split(4, "noise")] * 2,
            *(Split(4, "full"), Split(3, "full"), Split(3, "causal")),
        ),
        (Split(3, "noise"),),
    )
    assert batch.token_ids.tolist() == [1, 10, 2, *[3, 4] * 4, 1, 11, 2, 3, 4]
    assert batch.latent_index.tolist() == [4, 5, 8, 9, 12, 13, 22]
    assert batch.latents[:, 0].tolist() == [7, 7, 8, 8, 9, 9, 5]
    assert batch.times.tolist() == [0.5, 0.5, 0.25, 0.25, 0, 0, 0.75]
    assert batch.latent_grids == ((1, 2), (1, 2), (1, 2), (1, 1))
    assert batch.flow_rows.tolist() == [4, 5, 8, 9, 22]
    assert batch.targets.tolist() == [[-v] * 3 for v in (7, 7, 8, 8, 5)]
    # after the closing token of a picture, and inside the text
    assert batch.loss_rows.tolist() == [14, 18, 19, 23]
    assert batch.labels.tolist() == [77, 11, 2, 78]
    assert batch.loss_weights.tolist() == pytest.approx([1, 2**-0.5, 2**-0.5, 1])
    assert batch.loss_sample.tolist() == [0, 0, 0, 1]
    assert batch.next_positions == (9, 1)
    assert batch.sample_lens == (21, 3)


def test_a_gap_is_a_position_without_a_token():
    assert segment_length(Gap()) == 0
    batch = pack([[Gap(), Text((5,)), Gap(), Gap(), image(1, 1), Gap()], [Gap()], []], TOKENS)
    assert batch.position_ids.tolist() == [1, 2, 3, 6, 6, 6]
    assert batch.samples == ((Split(3, "causal"), Split(3, "full")), (), ())
    assert batch.next_positions == (8, 1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_learned_latents_leave_everything_else_where_it_was(seed):
    """Without them the same tokens have the same positions, splits and labels."""
    rng = random.Random(seed)
    kinds = (
        lambda: Text(tuple(rng.choices(range(10, 90), k=rng.randint(0, 4))), rng.random() < 0.5),
        lambda: image(rng.randint(1, 2), rng.randint(1, 2)),
        lambda: latent(rng.randint(1, 2), rng.randint(1, 2), rng.random()),
        lambda: latent(rng.randint(1, 2), rng.randint(1, 2), rng.random(), time=rng.random()),
        Gap,
    )
    samples = [[rng.choice(kinds)() for _ in range(8)] for _ in range(4)]
    bare = [[s for s in row if getattr(s, "target", None) is None] for row in samples]
    batch, rest = pack(samples, TOKENS), pack(bare, TOKENS)
    places = torch.cat([batch.token_index, batch.patch_index, batch.latent_index])
    assert torch.equal(places.sort().values, torch.arange(len(batch)))
    modes = [split for splits in batch.samples for split in splits]
    kept = torch.cat([torch.full((s.length,), s.mode != "noise") for s in modes])
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(batch.position_ids[kept], rest.position_ids)
    assert batch.next_positions == rest.next_positions
    assert torch.equal(batch.labels, rest.labels)
    assert [s for s in modes if s.mode != "noise"] == [s for row in rest.samples for s in row]
    assert len(batch.targets) == len(batch.flow_rows) == len(batch.latents) - len(rest.latents)
    at = batch.flow_rows[:, None] == batch.latent_index
    assert torch.equal(batch.targets, -(at.float() @ batch.latents))  # in the same order


def test_a_batch_goes_on_behind_the_positions_of_a_cache():
    batch = pack([[Text((5,)), latent(1, 1)], [], [image(1, 2)]], TOKENS)
    moved = batch.after(torch.tensor([10, 20, 30]))
    assert moved.position_ids.tolist() == [10, 11, 12, 13, 13, 13, 30, 30, 30, 30]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 3, 0, 0, 0, 0]
    assert moved.next_positions == batch.next_positions == (4, 0, 1)  # how far each row goes on


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


def test_latents_must_fit_their_grid_and_their_target():
    with pytest.raises(ValueError, match=r"latents of shape \(6, 5\) do not form a 2x2 grid"):
        Latent(torch.zeros(6, 5), 2, 2)
    with pytest.raises(ValueError, match=r"latents of shape \(4,\) do not form a 2x2 grid"):
        Latent(torch.zeros(4), 2, 2)
    named = r"target of shape \(4, 3\) for latents of shape \(4, 5\)"
    with pytest.raises(ValueError, match=named):
        Latent(torch.zeros(4, 5), 2, 2, 0.5, torch.zeros(4, 3))


def test_decode_batch_is_one_token_per_row():
    batch = decode_batch(torch.tensor([7, 8]), torch.tensor([20, 3]))
    assert batch.sample_lens == (1, 1) and batch.position_ids.tolist() == [20, 3]
    assert batch.loss_rows.tolist() == [0, 1] and batch.token_index.tolist() == [0, 1]


def test_moving_keeps_host_fields():
    batch = pack([[Text((5,), loss=True), image(1, 1), latent(1, 2, time=0.5)]], TOKENS)
    moved = batch.to("meta")
    assert moved.token_ids.is_meta and moved.patches.is_meta
    assert moved.latents.is_meta and moved.targets.is_meta and moved.times.is_meta
    assert moved.samples == batch.samples and moved.image_grids == ((1, 1),)
    assert moved.latent_grids == ((1, 2),)
