"""Supervised fine-tuning: the token mean over the whole step, contexts per row, what it writes."""

import sys
from collections import Counter

import pytest
import torch

from data.contexts import sft_sequence
from data.example import DataError
from data.mixture import load_mixture
from data.streams import stream_seed
from data.transforms import ImageTransform
from modeling.bagel import text_logits
from modeling.pretrained import is_generation_key, load_pretrained
from modeling.sequence import Image, pack
from tests.training import (
    WORLD,
    base_processor,
    draws,
    largest_difference,
    metric_lines,
    run_sft,
    same_segments,
    sft_argv,
    sft_config,
    weights_of,
    workspace,
)
from train import sft
from train.config import UsageError

TASKS = "Visual_Search, Spatial_Navigation, Jigsaw_Assembly, Chart_Refocus"
LINEAR = {"eps": 0.1, "lr": 0.5, "min_lr": 0.0}  # AdamW steps that do not magnify rounding


@pytest.fixture
def mixed(tmp_path):
    """Mixture file whose rows come in three contexts, plain in one source."""
    path = tmp_path / "mixed.yaml"
    path.write_text(
        f"text_reasoning:\n  dataset_names: [{TASKS}]\n  contexts:\n"
        "    default: {teacher: 2, student: 1, teacher_noise: 1}\n"
        "    Chart_Refocus: {student: 1}\n"
    )
    return path


def row_losses(model, config, step=0):
    """Cross-entropy of every loss token of a step in float64, one list per row."""
    processor, losses = base_processor(), []
    for row, drawn in draws(config, step):
        noise = None
        if drawn.context == "teacher_noise":
            noise = stream_seed(config.run.global_seed, "noise", step, row)
        segments = sft_sequence(drawn.example, processor, drawn.context, noise)
        batch = pack([segments], processor.tokenizer.special)
        with torch.no_grad():
            logprobs = model(batch, head=text_logits).double().log_softmax(-1)
        losses.append(-logprobs.gather(1, batch.labels[:, None])[:, 0])
    return losses


def test_loss_is_the_token_mean_over_the_step(tmp_path, mixed):
    flags = {"dataset_config_file": mixed, "global_batch": 10, "micro_batch": 3, "save_every": 1}
    lines = run_sft(tmp_path, lr=1e-2, **flags)
    config = sft_config(tmp_path, **flags)
    contexts = {drawn.context for _, drawn in draws(config)}
    assert contexts == {"student", "teacher", "teacher_noise"}
    models = [workspace() / "base", tmp_path / "checkpoints" / "0000001"]
    for step, folder in enumerate(models):
        losses = row_losses(load_pretrained(folder), config, step)
        tokens = torch.cat(losses).mean()
        assert lines[step]["loss"] == pytest.approx(float(tokens), rel=1e-5)
        rows = torch.stack([loss.mean() for loss in losses]).mean()
        assert abs(float(rows / tokens) - 1) > 1e-4  # the other mean would be seen


def test_gradient_is_that_of_the_token_mean(tmp_path, mixed):
    """One update of plain size: AdamW's first step with a large eps is lr * g / (|g| + eps)."""
    flags = {
        "dataset_config_file": mixed,
        "global_batch": 6,
        "total_steps": 1,
        "lr": 0.5,
        "eps": 1.0,
    }
    run_sft(tmp_path, micro_batch=4, max_grad_norm=float("inf"), **flags)
    config = sft_config(tmp_path, **flags)
    model = load_pretrained(workspace() / "base")
    processor, seed = base_processor(), config.run.global_seed
    sequences = [sft.sequence(row, drawn, processor, 0, seed) for row, drawn in draws(config)]
    batch = pack(sequences, processor.tokenizer.special)
    torch.nn.functional.cross_entropy(model(batch, head=text_logits), batch.labels).backward()
    after, norms = weights_of(tmp_path, 1), []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        expected = parameter.detach() - 0.5 * gradient / (gradient.abs() + 1.0)
        assert float((after[name] - expected).abs().max()) <= 2e-5, name
        norms.append(float(gradient.norm()))
    assert metric_lines(tmp_path)[0]["grad_norm"] == pytest.approx(
        sum(n * n for n in norms) ** 0.5, rel=1e-4
    )
    assert max(norms) > 0.1


def test_accumulation_gives_the_same_weights(tmp_path, mixed):
    for micro in (1, 4):
        run_sft(
            tmp_path / str(micro),
            dataset_config_file=mixed,
            total_steps=3,
            micro_batch=micro,
            **LINEAR,
        )
    one, four = (weights_of(tmp_path / str(micro), 3) for micro in (1, 4))
    assert largest_difference(one, four) <= 1e-5
    base = weights_of(workspace() / "base")
    assert largest_difference(one, base) > 1e-2
    generation = [key for key in base if is_generation_key(key)]
    assert generation
    assert all(torch.equal(one[key], base[key]) for key in generation)


def test_loss_falls(tmp_path):
    lines = run_sft(tmp_path, total_steps=40, global_batch=8, micro_batch=8, lr=5e-3)
    first, last = (sum(line["loss"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.6 * first


def test_contexts_come_in_the_shares_of_the_mixture(mixed):
    mixture = load_mixture(mixed, workspace() / "datasets", seed=3)
    found: dict[bool, Counter] = {True: Counter(), False: Counter()}
    for index in range(600):
        drawn = mixture.draw(index)
        found[drawn.example.source == "Chart_Refocus"][drawn.context] += 1
    assert set(found[True]) == {"student"}
    total = sum(found[False].values())
    for context, share in (("teacher", 0.5), ("student", 0.25), ("teacher_noise", 0.25)):
        assert found[False][context] / total == pytest.approx(share, abs=0.08)


def test_each_context_has_its_images_and_one_target(tmp_path, mixed):
    config = sft_config(tmp_path, dataset_config_file=mixed, global_batch=32)
    processor, seen = base_processor(), {}
    for row, drawn in draws(config):
        segments = sft.sequence(row, drawn, processor, 0, 7)
        images = [s for s in segments if isinstance(s, Image)]
        seen[drawn.context] = len(images)
        text = processor.tokenizer.decode(segments[-1].token_ids)
        example = drawn.example
        assert (
            text
            == f"<think>{example.full_text_only_thought}</think><answer>{example.answer}</answer>"
        )
        assert [s.loss for s in segments if not isinstance(s, Image)][-1:] == [True]
        assert sum(s.loss for s in segments if not isinstance(s, Image)) == 1
        again = sft.sequence(row, drawn, processor, 0, 7)
        other = sft.sequence(row, drawn, processor, 1, 7)
        assert same_segments(segments, again)
        assert same_segments(segments, other) == (drawn.context != "teacher_noise")
    assert seen == {"student": 1, "teacher": 2, "teacher_noise": 2}


def test_a_mixture_may_set_the_image_limits(tmp_path, mixed):
    config = sft_config(tmp_path, dataset_config_file=mixed)
    own = base_processor()
    assert sft.open_processor(config, sft.open_mixture(config)).transform == own.transform
    limits = "{max_image_size: 42, min_image_size: 28, image_stride: 14, max_pixels: 1764}"
    mixed.write_text(mixed.read_text() + f"  vit_image_transform_args: {limits}\n")
    opened = sft.open_processor(config, sft.open_mixture(config))
    assert opened.transform == ImageTransform(42, 28, 14, 1764) != own.transform
    assert opened.prompts == own.prompts
    assert opened.tokenizer.encode("<think>") == own.tokenizer.encode("<think>")

    mixed.write_text(mixed.read_text().replace("max_image_size: 42", "max_image_size: 84"))
    with pytest.raises(DataError, match="vit_image_transform_args: max_image_size 84"):
        sft.open_processor(config, sft.open_mixture(config))


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_backends_that_cannot_train_on_the_cpu_are_refused(tmp_path, backend):
    config = sft_config(tmp_path, attention_backend=backend)
    with pytest.raises(UsageError, match=f"--attention_backend {backend} .*use sdpa"):
        sft.train(config, WORLD)


def test_command_line_run_has_no_teacher_and_counts_updates(tmp_path, monkeypatch):
    argv = sft_argv(tmp_path, total_steps=3, save_every=2, log_every=2)
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv])
    sft.main()
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 3]
    names = {"step", "loss", "lr", "grad_norm", "skipped_records", "skipped_vts"}
    assert metric_lines(tmp_path)[0].keys() == names
    assert (tmp_path / "results" / "config.yaml").is_file()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["0000002", "0000003", "latest"]
    assert not list((tmp_path / "checkpoints").glob("*/ema*"))
