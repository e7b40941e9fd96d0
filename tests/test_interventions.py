"""Interventions on visual thoughts: what a model is shown that asks for a picture, and what not."""

import dataclasses
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch

from data.example import DataError, Example
from data.streams import stream_seed
from eval.backends.bagel import (
    DRAWN,
    QUESTION_ALONE,
    BagelConfig,
    BagelSystem,
    interleaved_context,
    noise_picture,
    picture_segments,
)
from eval.benchmarks import first_samples
from eval.protocol import Decoding, Drawing, Protocol
from eval.sample import Question, Sample
from eval.systems import is_sampled, system_config
from inferencer import InterleaveInferencer
from modeling.bagel import NoGenerationError
from modeling.sequence import Image, Latent
from tests.data_helpers import cell, noisy_png, png, record, write_source
from tests.test_interleaved import ASKING, CLOSING, Inferencer, photo
from tests.tiny_model import tiny_bagel, tiny_drawer
from tests.training import drawing_base
from train.config import UsageError

INTERVENTIONS = ("interleaved_noise", "interleaved_shuffled", "interleaved_none")
DRAWING = Drawing(num_timesteps=3, cfg_text_scale=1.0, max_rounds=2)
CPU = torch.device("cpu")
SCRIPT = {1: [ASKING], 2: [ASKING, CLOSING], 3: [CLOSING]}  # asks on and on, once, never


class Undrawing(Inferencer):
    """May not draw."""

    def _draw(self, *args, **options):
        raise AssertionError("a picture was drawn in vain")


def example_of(number: int, thoughts: int = 2) -> Example:
    pictures = tuple(photo(100 * number + i, (12, 20)) for i in range(thoughts))
    return Example("Toy", str(number), "Toy", "where?", "up", photo(number, (30, 14)), pictures)


def sample_of(number: int, other: Example | None = None) -> Sample:
    example = example_of(number)
    return Sample(
        "Toy", str(number), (example.problem_image, example.question), Question("match", "up"),
        example=example, other=lambda: other or example_of(number + 10),
    )  # fmt: skip


SAMPLES = [sample_of(number) for number in SCRIPT]


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer(seed=5)


def scripted(model, context: str, kind: type = Undrawing) -> BagelSystem:
    protocol = Protocol("test", Decoding(6), drawing=DRAWING)
    return BagelSystem("tiny", kind(model, script=SCRIPT), protocol, context)


def loaded(context: str) -> BagelSystem:
    """A checkpoint that often asks for pictures."""
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=True)
    protocol = Protocol("test", Decoding(2, 1.0), drawing=DRAWING)
    return BagelSystem("restless", inferencer, protocol, context)


def rows(count: int = 8) -> list[Sample]:
    return first_samples("Ragged", drawing_base().parent / "datasets", "train", count)


# --- what is shown --------------------------------------------------------------------------------


def test_noise_stands_in_for_every_picture_that_is_asked_for(drawer):
    always, once, never = scripted(drawer, "interleaved_noise").answer(SAMPLES, list(SCRIPT))
    assert [len(reply.pictures) for reply in (always, once, never)] == [2, 1, 0]
    assert always.text == ASKING * 3 and once.text == ASKING + CLOSING and never.text == CLOSING
    for seed, reply in ((1, always), (2, once)):
        for number, picture in enumerate(reply.pictures):
            expected = noise_picture((16, 8), stream_seed(seed, "noise", number))
            assert picture.size == (16, 8) and picture.tobytes() == expected.tobytes()
    shown = {picture.tobytes() for reply in (always, once) for picture in reply.pictures}
    assert len(shown) == 3


def test_noise_is_a_cut_standard_normal():
    pixels = np.asarray(noise_picture((200, 150), 7), dtype=np.float64) / 127.5 - 1
    assert pixels.shape == (150, 200, 3)
    assert np.mean(np.abs(pixels) == 1) == pytest.approx(0.3173, abs=0.008)  # beyond one sigma
    assert np.mean(pixels) == pytest.approx(0, abs=0.01)
    assert np.std(pixels) == pytest.approx(0.71837, abs=0.005)  # of the cut distribution
    inside = pixels[np.abs(pixels) < 1]
    assert np.mean(inside**2) == pytest.approx(0.29112, abs=0.005)  # of its middle part
    neighbours = np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.02
    assert noise_picture((4, 4), 7).tobytes() != noise_picture((4, 4), 8).tobytes()


def test_shuffled_shows_those_of_another_row_in_turn_and_in_the_drawn_size(drawer):
    bicubic = PIL.Image.Resampling.BICUBIC
    for count in (1, 2):
        other = example_of(30, thoughts=count)
        samples = [sample_of(number, other) for number in SCRIPT]
        replies = scripted(drawer, "interleaved_shuffled").answer(samples, list(SCRIPT))
        expected = [picture.resize((16, 8), bicubic) for picture in other.visual_thoughts]
        expected = (expected * 2)[:2]
        for reply, wanted in zip(replies, (2, 1, 0), strict=True):
            found = [picture.tobytes() for picture in reply.pictures]
            assert found == [picture.tobytes() for picture in expected[:wanted]]


def test_none_leaves_the_place_of_a_picture_empty(drawer):
    empty, noisy = (scripted(drawer, f"interleaved_{name}") for name in ("none", "noise"))
    replies = empty.answer(SAMPLES, list(SCRIPT))
    shown = noisy.answer(SAMPLES, list(SCRIPT))
    assert [reply.pictures for reply in replies] == [()] * 3
    assert [reply.skips for reply in replies] == [2, 1, 0]
    assert [reply.text for reply in replies] == [reply.text for reply in shown]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in shown]
    picture = 2 * (4 * 2 + 2)  # latents and patches of 16 x 8 pixels, with their marks
    pairs = zip(empty.inferencer.seen, noisy.inferencer.seen, strict=True)
    for number, (without, filled) in enumerate(pairs):
        assert without.positions.tolist() == filled.positions.tolist()
        missing = filled.lengths - without.lengths
        assert missing.tolist() == [number * picture] * (3 - number)
    assert number == 2


@pytest.mark.parametrize("context", INTERVENTIONS)
def test_what_comes_before_the_picture_is_as_it_was(context):
    """The first text does not know what will be shown, and only those that ask are shown it."""
    samples, seeds = rows(), list(range(40, 48))
    drawn = loaded("interleaved").interleave(samples, seeds)
    asked = [bool(answer.pictures) for answer in drawn]
    assert 2 <= sum(asked) < len(asked)
    answers = loaded(context).interleave(samples, seeds)
    assert [answer.pieces[0] for answer in answers] == [answer.pieces[0] for answer in drawn]
    assert [len(answer.rollouts) > 1 for answer in answers] == asked
    assert max(len(answer.rollouts) for answer in answers) <= 3
    assert any(a.text != d.text for a, d in zip(answers, drawn, strict=True))


@pytest.mark.parametrize("context", INTERVENTIONS)
def test_a_row_does_not_depend_on_those_beside_it(context):
    samples, seeds = rows(), list(range(40, 48))
    system = loaded(context)
    together = system.answer(samples, seeds)
    assert len(Counter(len(a.rollouts) for a in system.interleave(samples, seeds))) > 1
    for sample, seed, beside in zip(samples, seeds, together, strict=True):
        (alone,) = system.answer([sample], [seed])
        assert (alone.text, alone.tokens, alone.skips) == (beside.text, beside.tokens, beside.skips)
        assert [p.tobytes() for p in alone.pictures] == [p.tobytes() for p in beside.pictures]


# --- the sequence of an interleaved answer --------------------------------------------------------


def content(segment):
    if isinstance(segment, Image):
        return "patches", segment.height, segment.width, segment.patches.tolist()
    if isinstance(segment, Latent):
        return "latents", segment.height, segment.width, segment.tokens.tolist()
    return "text", segment.token_ids


@pytest.mark.parametrize(
    "pieces",
    [
        [photo(1, (30, 14)), "where?"],
        ["first", photo(1), "then", photo(2, (10, 18)), "?"],
        [photo(1), ""],
        ["no picture"],
    ],
)
def test_the_context_is_what_the_inferencer_shows(drawer, pieces):
    inferencer = Undrawing(drawer, script={9: [CLOSING]})
    inferencer.interleave_batch([pieces], seeds=[9])
    ((shown,),) = inferencer.opened
    found = interleaved_context(inferencer, pieces, 9)
    assert [content(segment) for segment in found] == [content(segment) for segment in shown]
    other = interleaved_context(inferencer, pieces, 10)
    has_picture = any(not isinstance(piece, str) for piece in pieces)
    assert ([content(s) for s in other] != [content(s) for s in found]) == has_picture


def test_a_drawn_picture_is_what_the_inferencer_shows_behind_it(drawer):
    """With latents of the wrong noise, or no resize, another cache would come of it."""
    inferencer, noise = Undrawing(drawer, script=SCRIPT), noise_picture((16, 8), 3)
    added = []
    extended = inferencer._extended
    inferencer._extended = lambda cache, rows: added.append(rows) or extended(cache, rows)
    inferencer.interleave_batch([[photo(1, (30, 14)), "?"]], seeds=[2], given=[[noise]])
    _, [shown] = added  # the text, the picture
    found = picture_segments(inferencer, noise, 2, 1)
    assert [content(segment) for segment in found] == [content(segment) for segment in shown]


def test_patches_are_made_of_the_picture_in_the_size_of_the_vae():
    inferencer = loaded("interleaved").inferencer  # other limits for latents than for patches
    picture = photo(1, (100, 60)).convert("RGBA")
    found = picture_segments(inferencer, picture, 9, 2)
    expected = inferencer._image(picture, 9, 2)
    assert [content(segment) for segment in found] == [content(segment) for segment in expected]
    straight = inferencer.processor.transform.segment(picture)
    assert not found[1].patches.equal(straight.patches)


# --- what is refused, and what varies -------------------------------------------------------------


def test_a_benchmark_without_visual_thoughts_can_be_shown_noise_and_nothing(drawer):
    plain = [dataclasses.replace(sample, example=None, other=None) for sample in SAMPLES]
    for context in ("interleaved_noise", "interleaved_none"):
        assert context in QUESTION_ALONE
        texts = [reply.text for reply in scripted(drawer, context).answer(plain, list(SCRIPT))]
        assert texts[2] == CLOSING and ASKING in texts[0]
    assert "interleaved_shuffled" not in QUESTION_ALONE
    with pytest.raises(UsageError, match="interleaved_shuffled shows visual thoughts, and Toy has"):
        scripted(drawer, "interleaved_shuffled").answer(plain, list(SCRIPT))


def test_another_row_without_visual_thoughts_is_named(drawer):
    bare = [sample_of(1, example_of(11, thoughts=0))]
    with pytest.raises(DataError, match="visual thoughts of another row, and the one beside 1 of"):
        scripted(drawer, "interleaved_shuffled").answer(bare, [1])


def test_a_damaged_picture_in_the_row_beside_ends_no_evaluation(drawer, tmp_path):
    rows = [record(k, problem_image_0=cell(png(k, (30, 14)))) for k in range(3)]
    rows[1]["reasoning_image_0"] = cell(noisy_png()[:1500])
    write_source(tmp_path, "Toys", rows)
    samples = first_samples("Toys", tmp_path, "train", 3)
    assert [len(sample.example.visual_thoughts) for sample in samples] == [1, 0, 1]
    replies = scripted(drawer, "interleaved_shuffled").answer(samples, list(SCRIPT))
    assert [len(reply.pictures) for reply in replies] == [2, 1, 0]
    for reply, other in zip(replies[:2], (2, 0), strict=True):
        (expected,) = samples[other].example.visual_thoughts
        assert {picture.tobytes() for picture in reply.pictures} == {
            expected.resize((16, 8), PIL.Image.Resampling.BICUBIC).tobytes()
        }
    teacher = scripted(drawer, "teacher_shuffled")
    assert len(teacher.segments(samples[2], 0)) == len(teacher.segments(samples[0], 0))


@pytest.mark.parametrize("control", ["blank", "problem", "crop"])
def test_only_shuffled_needs_another_row(drawer, control):
    alone = dataclasses.replace(sample_of(1), other=None)
    system = scripted(drawer, f"teacher_{control}")
    found, beside = (system.segments(sample, 3) for sample in (alone, sample_of(1)))
    assert [content(segment) for segment in found] == [content(segment) for segment in beside]
    with pytest.raises(DataError, match="and the one beside 1 of Toy has none; give it one that"):
        scripted(drawer, "teacher_shuffled").segments(alone, 3)


def test_a_model_without_its_vae_is_refused():
    inferencer = Inferencer(tiny_bagel())
    inferencer.vae_model = None
    system = BagelSystem("blind", inferencer, Protocol("test"), "interleaved_none")
    with pytest.raises(NoGenerationError, match="draws=True"):
        system.answer(SAMPLES[:1], [0])


@pytest.mark.parametrize("name", ["noise", "shuffled", "none"])
def test_the_systems_have_runs_and_open_with_the_vae(name):
    config = system_config(f"thinkmorph-{name}={drawing_base()}")
    assert config.model == BagelConfig(str(drawing_base()), f"interleaved_{name}")
    assert config.model.context in DRAWN and is_sampled(config, Protocol("greedy"))
    system = BagelSystem.open(name, config.model, Protocol("greedy", drawing=DRAWING), CPU)
    assert system.inferencer.vae_model is not None


@pytest.mark.parametrize("context", INTERVENTIONS)
def test_greedy_answers_vary_with_the_seed(context):
    """All of them: the encoding of the problem picture is random."""
    first, second = (
        interleaved_context(system.inferencer, system.pieces(rows(1)[0]), seed)
        for system, seed in ((loaded(context), 0), (loaded(context), 1))
    )
    latents = [s.tokens for context in (first, second) for s in context if isinstance(s, Latent)]
    assert not latents[0].equal(latents[1])
