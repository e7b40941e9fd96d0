"""Decoding rows: spellings, ragged visual thoughts, damage, missing columns."""

import pytest

from data.example import (
    ALL_FIELDS,
    DataError,
    ExampleError,
    Fields,
    check_complete,
    decode_example,
)
from tests.data_helpers import cell, noisy_png, png, record

QUESTION_FIELDS = Fields(visual_thoughts=False, thoughts=False, full_text_only_thought=False)


def test_every_field_of_a_row():
    example = decode_example(record(3), "Toy", 9)
    assert example.key == "Toy/p3"
    assert (example.task, example.question, example.answer) == ("toy", "question 3?", "B")
    assert example.problem_image.getpixel((0, 0)) == (3, 0, 7)
    assert [vt.getpixel((0, 0)) for vt in example.visual_thoughts] == [(1003 % 256, 3, 7)]
    assert example.thoughts == ("first 3", "second 3")
    assert example.full_text_only_thought == "because 3"
    assert example.skipped_vts == 0


def test_both_spellings_of_thoughts():
    row = record(0, resoning_thought_1=..., reasoning_thought_1="spelt right")
    assert decode_example(row, "Toy", 0).thoughts == ("first 0", "spelt right")


def test_several_visual_thoughts_keep_row_order_and_gaps_close():
    row = record(
        0,
        reasoning_image_1=cell(None),
        reasoning_image_2=cell(png(2002)),
        reasoning_image_3=None,
        reasoning_image_7=cell(png(2007)),
        resoning_thought_7="eighth",
    )
    example = decode_example(row, "Toy", 0)
    colours = [1000, 2002, 2007]
    pixels = [vt.getpixel((0, 0))[:2] for vt in example.visual_thoughts]
    assert pixels == [(c % 256, c // 256) for c in colours]
    assert example.thoughts[-1] == "eighth"
    assert example.skipped_vts == 0
    assert len(decode_example(row, "Toy", 0, Fields(max_rounds=3)).visual_thoughts) == 2


@pytest.mark.parametrize("damage", [b"not an image", noisy_png()[:2000]])
def test_damaged_visual_thoughts_are_skipped_and_counted(damage):
    row = record(0, reasoning_image_1=cell(damage), reasoning_image_2=cell(png(2)))
    example = decode_example(row, "Toy", 0)
    assert len(example.visual_thoughts) == 2
    assert example.skipped_vts == 1


@pytest.mark.parametrize("damage", [b"not an image", noisy_png()[:2000], b"", None])
def test_damaged_problem_image_names_file_row_and_column(damage):
    with pytest.raises(ExampleError, match=r"some\.parquet, row 5 of Toy: column problem_image_0"):
        decode_example(record(0, problem_image_0=cell(damage)), "Toy", 5, file="some.parquet")


def test_empty_answer_is_an_error_of_the_row():
    with pytest.raises(ExampleError, match="column answer is empty"):
        decode_example(record(0, answer=None), "Toy", 0)


def test_pid_and_task_have_fallbacks():
    example = decode_example(record(0, pid=None, task=...), "Toy", 17)
    assert (example.pid, example.task) == ("17", "Toy")


def test_missing_column_names_it_and_those_present():
    row = record(0, full_text_only_thought=...)
    with pytest.raises(DataError, match="missing column.*full_text_only_thought; .* has answer, "):
        decode_example(row, "Toy", 0, file="x.parquet")
    assert decode_example(row, "Toy", 0, QUESTION_FIELDS).full_text_only_thought == ""


def test_only_asked_for_fields_are_read():
    columns = set(record(0, reasoning_image_1=cell(png(1))))
    question = ("problem_image_0", "question", "answer", "pid", "task")
    assert QUESTION_FIELDS.columns(columns, "f") == question
    opsd = Fields(thoughts=False, full_text_only_thought=False)
    images = ("reasoning_image_0", "reasoning_image_1")
    assert set(opsd.columns(columns, "f")) == {*question, *images}
    assert set(ALL_FIELDS.columns(columns, "f")) == columns


def test_a_row_without_what_was_asked_for_is_incomplete():
    no_image = decode_example(record(0, reasoning_image_0=cell(b"junk")), "Toy", 0)
    with pytest.raises(ExampleError, match=r"reasoning_image_\* is empty or damaged \(1 damaged"):
        check_complete(no_image, ALL_FIELDS, "here")
    check_complete(no_image, QUESTION_FIELDS, "here")
    no_text = decode_example(record(0, full_text_only_thought=" "), "Toy", 0)
    with pytest.raises(ExampleError, match="full_text_only_thought is empty"):
        check_complete(no_text, ALL_FIELDS, "here")
