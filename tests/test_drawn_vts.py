"""--vt_source generated: the current teacher draws its visual thoughts; nothing else changes."""

import dataclasses

import pyarrow.parquet as pq
import pytest
import torch

from data.processor import Processor
from data.streams import stream_seed
from inferencer import InterleaveInferencer
from modeling.bagel import NoGenerationError
from modeling.pretrained import is_generation_key, load_pretrained
from tests.training import (
    WORLD,
    drawing_base,
    draws,
    largest_difference,
    opsd_config,
    run_opsd,
    weights_of,
    workspace,
)
from train.config import UsageError
from train.drawn_vts import DrawingTeacher
from train.parallel import wrap

FLAGS = {"vt_source": "generated", "vt_num_timesteps": 3, "vt_cfg_text_scale": 1.0}


def generated(folder, **flags):
    """Flags of a run whose teacher draws."""
    flags = {"vt_max_think_tokens": 8, "global_batch": 8, "micro_batch": 8} | flags
    return FLAGS | {"model_path": drawing_base()} | flags


@pytest.fixture
def config(tmp_path):
    return opsd_config(tmp_path, **generated(tmp_path))


@pytest.fixture
def rows(config):
    return draws(config)


def levels(picture):
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()


def teacher_of(config):
    return wrap(load_pretrained(config.model.model_path), WORLD)


def test_pictures_are_those_the_teacher_draws(config, rows):
    drawing = DrawingTeacher(config, Processor.from_pretrained(drawing_base()), WORLD)
    redrawn = drawing.redraw(rows, teacher_of(config), step=5)
    inferencer = InterleaveInferencer.from_pretrained(drawing_base(), draws=True)
    suffix = inferencer.processor.prompts.instruction_suffix
    drawn = 0
    for row, old in rows:
        seed = stream_seed(config.run.global_seed, "draw", 5, row)
        inputs = [old.example.problem_image, old.example.question + suffix]
        (answer,) = inferencer.interleave_batch([inputs], drawing.params, [seed])
        found = [new.example for number, new in redrawn if number == row]
        assert len(found) == bool(answer.pictures)  # a row without a picture is left out
        for example in found:
            drawn += 1
            for ours, alone in zip(example.visual_thoughts, answer.pictures, strict=True):
                assert ours.size == alone.size and (levels(ours) - levels(alone)).abs().max() <= 1
            kept = dataclasses.replace(example, visual_thoughts=old.example.visual_thoughts)
            assert kept == old.example
    assert drawn > 0


def test_it_is_the_teacher_of_the_step_that_draws(config, rows):
    """Understanding weights follow the teacher, generation weights stay."""
    drawing = DrawingTeacher(config, Processor.from_pretrained(drawing_base()), WORLD)
    before = {k: v.clone() for k, v in drawing.inferencer.model.named_parameters()}
    teacher = teacher_of(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.01)
    drawing.redraw(rows, teacher, step=0)
    for key, value in drawing.inferencer.model.named_parameters():
        moved = 0.0 if is_generation_key(key) else 0.01
        torch.testing.assert_close(value, before[key] + moved, atol=1e-6, rtol=0)


def test_run_trains_and_leaves_generation_weights_alone(tmp_path):
    lines = run_opsd(tmp_path, **generated(tmp_path))
    assert all(0 <= line["undrawn"] < 1 for line in lines) and lines[0]["loss"] > 0
    base, trained = (
        weights_of(folder) for folder in (drawing_base(), tmp_path / "checkpoints" / "latest")
    )
    for key in base:
        if is_generation_key(key):
            assert torch.equal(base[key], trained[key]), key
    assert largest_difference(base, trained) > 0


def test_other_pictures_give_another_run(tmp_path):
    flags = generated(tmp_path, total_steps=1)
    drawn = run_opsd(tmp_path / "drawn", **flags)
    again = run_opsd(tmp_path / "again", **flags)
    given = run_opsd(tmp_path / "given", **flags | {"vt_source": "dataset"})
    assert drawn[0]["loss"] == again[0]["loss"] != given[0]["loss"]
    assert "undrawn" not in given[0]


def test_data_needs_no_visual_thoughts(tmp_path):
    root = tmp_path / "datasets"
    for file in (workspace() / "datasets").rglob("*.parquet"):
        table = pq.read_table(file)
        target = root / file.relative_to(workspace() / "datasets")
        target.parent.mkdir(parents=True, exist_ok=True)
        names = [name for name in table.column_names if "reasoning_image" not in name]
        pq.write_table(table.select(names), target)
    flags = generated(tmp_path, data_root=root, total_steps=1)
    assert run_opsd(tmp_path, **flags)[0]["loss"] > 0


def test_noise_in_place_of_drawings_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        opsd_config(tmp_path, **generated(tmp_path, noise_vt=True))
    assert "drawing them first" in capsys.readouterr().err


def test_base_without_latent_heads_is_refused(tmp_path):
    with pytest.raises((NoGenerationError, UsageError), match="cannot draw: it has no latent"):
        run_opsd(tmp_path, **generated(tmp_path, model_path=workspace() / "base"))


@pytest.mark.parametrize(
    ("flag", "value"), [("vt_rounds", 0), ("vt_num_timesteps", 1), ("vt_timestep_shift", 0)]
)
def test_bad_flags_name_the_value(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        opsd_config(tmp_path, **generated(tmp_path, **{flag: value}))
    assert f"--{flag} must be" in capsys.readouterr().err
