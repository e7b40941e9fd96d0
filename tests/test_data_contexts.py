"""Contexts: the exact token layout of C_S and C_T, and what noise may change."""

import dataclasses

import PIL.Image
import pytest
import torch

from data.contexts import (
    ConditionDropout,
    Noising,
    completion,
    interleaved_pictures,
    interleaved_sequence,
    question_context,
    reference_completion,
    sft_sequence,
    student_context,
    teacher_context,
)
from data.example import ExampleError, decode_example
from data.prompts import PAPER, PromptSet
from data.transforms import ImageTransform
from modeling.layers import patchify
from modeling.sequence import Gap, Image, Latent, Text, pack, segment_length
from tests.data_helpers import cell, png, record, small_processor

PROCESSOR = small_processor()
TOKENIZER = PROCESSOR.tokenizer


@pytest.fixture
def example():
    return decode_example(record(4, reasoning_image_1=cell(png(77, (56, 28)))), "Toy", 4)


def words(segments):
    """Text of text segments, pixel of the first patch for images."""
    first = {True: lambda s: TOKENIZER.decode(s.token_ids), False: lambda s: s.patches[0, 0].item()}
    return [first[isinstance(segment, Text)](segment) for segment in segments]


def red(value):
    return pytest.approx(value / 127.5 - 1, abs=1e-6)


def test_student_layout(example):
    assert words(student_context(example, PROCESSOR)) == ["SYS", red(4), "question 4?"]


def test_teacher_layout(example):
    expected = ["SYS", red(4), "question 4?", "REF", red(1004 % 256), red(77), "NOW"]
    segments = teacher_context(example, PROCESSOR)
    assert words(segments) == expected
    assert not any(segment.loss for segment in segments if isinstance(segment, Text))
    assert [(s.height, s.width) for s in segments if isinstance(s, Image)] == [
        (2, 2),
        (2, 2),
        (2, 4),
    ]


def test_teacher_never_sees_thoughts_or_answer(example):
    secret = dataclasses.replace(
        example, answer="XYZZY", thoughts=("XYZZY",), full_text_only_thought="XYZZY"
    )
    for vt, seed in (("real", None), ("noise", 1), ("none", None)):
        assert "XYZZY" not in "".join(map(str, words(teacher_context(secret, PROCESSOR, vt, seed))))


def test_token_ids_of_the_packed_contexts(example):
    """C_S and C_T token by token: turn tokens around each block, patches as bare places."""
    samples = [
        [*context(example, PROCESSOR), *completion([[90, 91]])]
        for context in (student_context, teacher_context)
    ]
    student, teacher = (pack([sample], TOKENIZER.special) for sample in samples)
    assert laid_out(student) == [*text("SYS"), 3, *[0] * 4, 4, *text("question 4?"), 1, 90, 91, 2]
    assert laid_out(teacher) == [
        *(*text("SYS"), 3, *[0] * 4, 4, *text("question 4?")),
        *(*text("REF"), 3, *[0] * 4, 4, 3, *[0] * 8, 4, *text("NOW")),
        *(1, 90, 91, 2),
    ]
    assert student.labels.tolist() == teacher.labels.tolist() == [90, 91, 2]


def text(words):
    return [1, *TOKENIZER.encode(words), 2]


def laid_out(batch):
    ids = torch.zeros(len(batch), dtype=torch.long)
    ids[batch.token_index] = batch.token_ids
    return ids.tolist()


def test_teacher_without_visual_thoughts_keeps_the_prompts(example):
    segments = teacher_context(example, PROCESSOR, vt="none")
    assert words(segments) == ["SYS", red(4), "question 4?", "REF", "NOW"]


def test_noise_differs_in_patches_of_visual_thoughts_only(example):
    real = teacher_context(example, PROCESSOR)
    noise = teacher_context(example, PROCESSOR, "noise", noise_seed=5)
    assert [segment_length(s) for s in real] == [segment_length(s) for s in noise]
    changed = []
    for index, (a, b) in enumerate(zip(real, noise, strict=True)):
        if isinstance(a, Text):
            assert a == b
        else:
            assert (a.height, a.width) == (b.height, b.width)
            if not torch.equal(a.patches, b.patches):
                changed.append(index)
    assert changed == [4, 5]


def test_noise_is_keyed_standard_normal_and_new_for_each_image(example):
    def patches(seed):
        segments = teacher_context(example, PROCESSOR, "noise", seed)
        return torch.cat([segments[4].patches, segments[5].patches])

    assert torch.equal(patches(5), patches(5))
    assert not torch.equal(patches(5), patches(6))
    assert not torch.equal(patches(5)[:4], patches(5)[4:8])
    values = patches(5)
    assert values.numel() == 12 * 588
    assert abs(values.mean().item()) < 0.06
    assert abs(values.std().item() - 1) < 0.04


def test_noise_needs_a_seed_and_nothing_else_takes_one(example):
    with pytest.raises(ValueError, match="noise_seed=None"):
        teacher_context(example, PROCESSOR, "noise")
    with pytest.raises(ValueError, match="noise_seed=1"):
        teacher_context(example, PROCESSOR, "real", noise_seed=1)


def test_teacher_needs_a_visual_thought(example):
    bare = dataclasses.replace(example, visual_thoughts=(), skipped_vts=2)
    with pytest.raises(ExampleError, match=r"Toy/p4: no visual thought .*\(2 could not"):
        teacher_context(bare, PROCESSOR)
    assert len(teacher_context(bare, PROCESSOR, vt="none")) == 5


def test_image_scale_shrinks_visual_thoughts_only(example):
    def grids(vt, seed):
        segments = teacher_context(example, PROCESSOR, vt, seed, image_scale=0.5)
        return [(s.height, s.width) for s in segments if isinstance(s, Image)]

    assert grids("real", None) == [(2, 2), (1, 1), (1, 2)]
    assert grids("noise", 3) == [(2, 2), (1, 1), (1, 2)]


def test_empty_prompts_leave_their_blocks_out(example):
    processor = small_processor(PromptSet("bare", "", "", "", instruction_suffix=" Go."))
    expected = [red(4), "question 4? Go.", red(1004 % 256), red(77)]
    assert words(teacher_context(example, processor)) == expected


def test_question_context_takes_several_images(example):
    images = [example.problem_image, *example.visual_thoughts]
    segments = question_context(images, "Which?", PROCESSOR)
    assert words(segments) == ["SYS", red(4), red(1004 % 256), red(77), "Which?"]


def test_completion_rounds_carry_loss_separately():
    assert completion([[1, 2], [3]]) == [Text((1, 2), loss=True), Text((3,), loss=True)]


@pytest.mark.parametrize(
    ("context", "seed", "length"),
    [("student", None, 3), ("teacher", None, 7), ("teacher_noise", 1, 7)],
)
def test_sft_sequence_has_loss_on_the_reference_only(example, context, seed, length):
    *before, target = sft_sequence(example, PROCESSOR, context, seed)
    assert len(before) == length
    assert not any(segment.loss for segment in before if isinstance(segment, Text))
    assert target.loss
    assert TOKENIZER.decode(target.token_ids) == "<think>because 4</think><answer>A</answer>"
    assert list(target.token_ids) == reference_completion(example, PROCESSOR)


# ---- interleaved rows -------------------------------------------------------------------------

DRAWS = dataclasses.replace(PROCESSOR, vae_transform=ImageTransform(28, 8, 4, 28 * 28))


def draws(example, noisings=(), dropout=None):
    """The row, the latents of picture i being (3, 4, 6) numbers i."""
    latents = [torch.full((3, 4, 6), float(i)) for i in range(1 + len(example.visual_thoughts))]
    return interleaved_sequence(example, DRAWS, latents, 2, noisings, dropout)


def outline(segments):
    """Texts (those with loss behind a sign), `picture i`, its value at a time, and grids."""
    names = []
    for segment in segments:
        if isinstance(segment, Text):
            names.append(">" * segment.loss + TOKENIZER.decode(segment.token_ids))
        elif isinstance(segment, Latent):
            value = segment.tokens[0, 0].item()
            learned = segment.target is not None
            names.append((value, segment.time) if learned else f"picture {value:.0f}")
        else:
            names.append("gap" if isinstance(segment, Gap) else (segment.height, segment.width))
    return names


@pytest.fixture
def drawing(example):
    return dataclasses.replace(example, thoughts=("a", "b", "c"))


EVERYTHING = [
    *("SYS", "picture 0", (2, 2), "question 4?"),
    *("><think>a</think><image_start>", "picture 1", (2, 2)),
    *("><image_end><think>b</think><image_start>", "picture 2", (2, 4)),
    "><image_end><think>c</think><answer>A</answer>",
]


def test_layout_of_two_drawn_thoughts(drawing):
    assert outline(draws(drawing)) == EVERYTHING


def test_layout_of_one_and_of_no_drawn_thought(drawing):
    pictures = drawing.visual_thoughts
    one = dataclasses.replace(drawing, thoughts=("a", "c"), visual_thoughts=pictures[:1])
    assert outline(draws(one)) == [*EVERYTHING[:7], EVERYTHING[-1]]
    none = dataclasses.replace(drawing, thoughts=("c",), visual_thoughts=())
    assert outline(draws(none)) == [*EVERYTHING[:4], "><think>c</think><answer>A</answer>"]


def test_a_thought_is_noised_as_often_as_asked_before_it_is_shown(drawing):
    """Along the line from the picture (1 or 2) to noise (9)."""
    noise = torch.full((3, 4, 6), 9.0)
    noisings = [[Noising(0.25, noise), Noising(0.5, noise)], [Noising(1.0, noise)]]
    segments = draws(drawing, noisings)
    expected = list(EVERYTHING)
    expected[8:8] = [(9.0, 1.0)]
    expected[5:5] = [(3.0, 0.25), (5.0, 0.5)]
    assert outline(segments) == expected
    targets = [s.target for s in segments if isinstance(s, Latent) and s.target is not None]
    assert [(t.shape, t.unique().tolist()) for t in targets] == [
        *[((6, 12), [9.0 - 1.0])] * 2,
        ((6, 12), [9.0 - 2.0]),
    ]


def test_a_picture_is_its_latents_in_patches(drawing):
    latents = list(torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(1)))
    blocks = interleaved_sequence(drawing, DRAWS, latents, 2)
    blocks = [block for block in blocks if isinstance(block, Latent)]
    for block, picture in zip(blocks, latents, strict=True):
        assert torch.equal(block.tokens, patchify(picture, 2))
        assert (block.height, block.width) == (2, 3)


def test_dropped_conditions_leave_their_places(drawing):
    """What is left of the pictures stays where it was; a dropped question leaves none."""
    noisings = [[Noising(0.5, torch.zeros(3, 4, 6))]] * 2
    whole = draws(drawing, noisings)
    kept = draws(drawing, noisings, ConditionDropout(False, frozenset({0, 2}), frozenset({1})))
    gaps = [number for number, segment in enumerate(kept) if isinstance(segment, Gap)]
    assert [outline(whole)[number] for number in gaps] == ["picture 0", (2, 2), "picture 2"]
    assert gaps == [1, 7, 10]  # the patches of the problem, next to its latents, stay
    there = [n for n in range(len(whole)) if n not in gaps]
    assert [outline(kept)[n] for n in there] == [outline(whole)[n] for n in there]

    def places(segments, numbers):
        """Rotary positions of the blocks of these numbers."""
        positions = pack([segments], TOKENIZER.special).position_ids
        blocks = positions.split([segment_length(segment) for segment in segments])
        return [blocks[n].tolist() for n in numbers]

    assert places(kept, there) == places(whole, there)

    silent = draws(drawing, noisings, ConditionDropout(text=True))
    assert outline(silent) == outline(whole[:3] + whole[4:])
    length = segment_length(whole[3])
    moved = [[place - length for place in block] for block in places(whole, range(4, len(whole)))]
    assert places(silent, range(3, len(silent))) == moved


def test_both_encoders_see_the_picture_in_the_size_of_the_vae(example):
    grey = PIL.Image.new("L", (56, 50), 200)
    pictures = interleaved_pictures(dataclasses.replace(example, problem_image=grey), DRAWS)
    assert [(p.size, p.mode) for p in pictures] == [
        *[((28, 24), "RGB"), ((28, 28), "RGB"), ((28, 16), "RGB")],
    ]
    noisy = dataclasses.replace(example, problem_image=PIL.Image.effect_noise((56, 50), 90))
    segments = draws(dataclasses.replace(noisy, thoughts=("a", "b", "c")))
    resized = interleaved_pictures(noisy, DRAWS)[0]
    expected = DRAWS.transform.segment(resized)
    assert torch.equal(segments[2].patches, expected.patches)
    assert not torch.equal(DRAWS.transform.segment(noisy.problem_image).patches, expected.patches)


@pytest.mark.parametrize("thoughts", [("a", "b"), ("a", "b", "c", "d"), ()])
def test_each_picture_needs_a_thought_on_both_sides(drawing, thoughts):
    row = dataclasses.replace(drawing, thoughts=thoughts)
    named = f"Toy/p4: {len(thoughts)} thoughts around 2 visual thoughts; one more is needed"
    with pytest.raises(ExampleError, match=named):
        draws(row)


def test_empty_prompts_leave_their_blocks_out_of_interleaved_rows(drawing):
    bare = dataclasses.replace(DRAWS, prompts=PromptSet("bare", "", "", "", " Go."))
    latents = [torch.zeros(3, 4, 6)] * 3
    segments = interleaved_sequence(drawing, bare, latents, 2)
    assert outline(segments)[:3] == ["picture 0", (2, 2), "question 4? Go."]


def test_sft_needs_the_text(example):
    with pytest.raises(ExampleError, match="full_text_only_thought is empty"):
        sft_sequence(dataclasses.replace(example, full_text_only_thought=""), PROCESSOR)


def test_paper_prompts_are_the_inference_variant():
    assert PAPER.system.startswith("\nLet's think step by step")
    assert PAPER.system.endswith("i.e.<answer> answer here </answer>.\n")
    assert "<image_start> </image_end>" in PAPER.system
    assert "  " not in PAPER.system + PAPER.reference_intro + PAPER.transition
