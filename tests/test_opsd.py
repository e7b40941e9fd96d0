"""Algorithm 1 on a tiny model: the loss, its gradient, the teachers, what a run writes."""

import dataclasses
import math
import sys

import pytest
import torch
import yaml
from torch import nn

from data.miniworld.world import TASKS
from data.token_classes import CLASSES, TokenClassifier, classes_of
from modeling.bagel import text_logits
from modeling.generation import Rollout, Round, SamplingParams
from modeling.pretrained import is_generation_key, load_pretrained
from modeling.sequence import pack
from tests.data_helpers import cell, png, record, write_source
from tests.training import (
    WORLD,
    all_lines,
    base_processor,
    draws,
    largest_difference,
    metric_lines,
    opsd_argv,
    opsd_config,
    run_opsd,
    weights_of,
    workspace,
)
from train import opsd, rollout
from train.config import UsageError
from train.rollout import placeholder, prepare, sample
from train.teacher import FixedTeacher

CPU = torch.device("cpu")
LINEAR = {"eps": 0.1, "lr": 0.5, "min_lr": 0.0}  # AdamW steps that do not magnify rounding


def trajectories_of(config, model, step=0):
    """What the run of `config` samples at `step` with the weights of `model`."""
    processor, seed = base_processor(), config.run.global_seed
    prompts = prepare(
        draws(config, step), processor, config.sampling, step, seed, config.distill.noise_vt
    )
    return sample(model, prompts, processor, config.sampling.params, step, seed)


# ---- an independent float64 reading of the equations, one trajectory at a time, full logits -----


def logprobs_of(model, segments):
    batch = pack([segments], base_processor().tokenizer.special)
    with torch.no_grad():
        return model(batch, head=text_logits).double().log_softmax(-1), batch.labels


def jsd_of_rows(student, teacher, k, clip, beta):
    """Eq. 7 over the teacher's K largest entries, renormalised; every term at most `clip`."""
    kept = teacher.argsort(dim=-1, descending=True)[:, :k]
    p = teacher.gather(1, kept).exp()
    q = student.gather(1, kept).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    m = beta * p + (1 - beta) * q
    terms = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    return (terms.clamp(max=clip) if clip > 0 else terms).sum(-1)


def expected_loss(config, student, teacher, step=0):
    """Mean over trajectories of the mean over their rows."""
    distill, values = config.distill, []
    for trajectory in trajectories_of(config, student, step):
        ours, labels = logprobs_of(student, trajectory.student)
        theirs, _ = logprobs_of(teacher, trajectory.teacher)
        sampled = (
            len(labels) - trajectory.ends_open
        )  # closing tokens that were cut off do not count
        picked = labels[:sampled, None]
        logp, logq = ours[:sampled].gather(1, picked), theirs[:sampled].gather(1, picked)
        if distill.jsd_loss_kind == "tinker":
            value = -((logq - logp) * logp).mean()
        else:
            rows = jsd_of_rows(
                ours, theirs, distill.jsd_top_k, distill.jsd_token_clip, distill.jsd_beta
            )
            value = rows.mean()
        values.append(distill.jsd_weight * value - distill.ce_weight * logp.mean())
    return float(torch.stack(values).mean())


@pytest.mark.parametrize(
    "flags",
    [
        {"jsd_token_clip": 0.002, "jsd_beta": 0.3},
        {"noise_vt": True, "jsd_token_clip": 0},
        {"jsd_weight": 0.5, "ce_weight": 0.25},
        {"jsd_loss_kind": "tinker", "ce_weight": 0.1},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_loss_is_the_mean_over_trajectories_of_the_mean_over_rows(tmp_path, flags):
    flags = {"global_batch": 6, "micro_batch": 4, "global_seed": 3, **flags}
    (line, *_) = run_opsd(tmp_path, total_steps=1, **flags)
    base = load_pretrained(workspace() / "base")
    config = opsd_config(tmp_path, **flags)
    lengths = {len(t.rollout.token_ids) for t in trajectories_of(config, base)}
    assert len(lengths) > 1  # or the order of the means would not matter
    assert {t.ends_open for t in trajectories_of(config, base)} == {True, False}
    assert line["loss"] == pytest.approx(expected_loss(config, base, base), rel=2e-5)
    assert abs(line["loss"]) > 1e-3


@pytest.mark.parametrize("mode", ["self", "ema", "fixed"])
def test_second_step_uses_the_updated_student_and_the_teacher_of_the_mode(tmp_path, mode):
    flags = {"teacher_mode": mode, "ema_decay": 0.5, "lr": 1e-2, "save_every": 1}
    lines = run_opsd(tmp_path, **flags)
    after_one = tmp_path / "checkpoints" / "0000001"
    assert (after_one / "ema.safetensors").exists() == (mode == "ema")
    student = load_pretrained(after_one, weights="student")
    teachers = {"self": student, "fixed": load_pretrained(workspace() / "base")}
    if mode == "ema":
        teachers["ema"] = load_pretrained(after_one, weights="ema")
    config = opsd_config(tmp_path, **flags)
    losses = {
        name: expected_loss(config, student, module, step=1) for name, module in teachers.items()
    }
    assert lines[1]["loss"] == pytest.approx(losses[mode], rel=1e-4)
    others = [value for name, value in losses.items() if name != mode]
    assert all(abs(value / losses[mode] - 1) > 1e-3 for value in others)


def test_ema_is_the_closed_form_of_the_students(tmp_path):
    decay, steps = 0.8, 4
    run_opsd(tmp_path, total_steps=steps, save_every=1, ema_decay=decay, lr=1e-2)
    start = weights_of(workspace() / "base")
    students = [weights_of(tmp_path, step) for step in range(1, steps + 1)]
    for n in range(1, steps + 1):
        average = weights_of(tmp_path, n, "ema")
        for key in (key for key in average if not is_generation_key(key)):
            expected = decay**n * start[key].double()
            for k, student in enumerate(students[:n], start=1):
                expected = expected + (1 - decay) * decay ** (n - k) * student[key].double()
            assert float((average[key] - expected).abs().max()) <= 2e-6, (n, key)
    assert largest_difference(students[0], students[-1]) > 1e-3


def test_drift_is_the_distance_of_teacher_and_student(tmp_path):
    flags = {"total_steps": 3, "log_every": 2, "save_every": 1, "ema_decay": 0.5, "lr": 1e-2}
    lines = run_opsd(tmp_path, **flags)
    for line, step in zip(lines, (2, 3), strict=True):
        student, teacher = (weights_of(tmp_path, step, name) for name in ("model", "ema"))
        keys = [key for key in student if not is_generation_key(key)]
        gaps = torch.cat([(student[k].double() - teacher[k].double()).flatten() for k in keys])
        rms = float(gaps.square().mean().sqrt())
        assert rms > 1e-4
        assert line["teacher_drift"] == pytest.approx(rms, rel=1e-5)


# ---- gradients --------------------------------------------------------------------------------


def gradients(config, micro_batch):
    """Gradients of one step by accumulation over micro batches."""
    student = load_pretrained(workspace() / "base")
    teacher = FixedTeacher(load_pretrained(workspace() / "base"))
    micros = opsd.micro_batches(trajectories_of(config, student), 6, micro_batch, None)
    count = sum(len(micro) for micro in micros)
    loss = 0.0
    for micro in micros:
        scored = opsd.distillation(
            student, teacher, micro, count, config.distill, base_processor().tokenizer.special, CPU
        )
        scored["loss"].backward()
        loss += float(scored["loss"].detach())
    assert all(p.grad is None for p in teacher.module.parameters())
    return loss, {name: p.grad for name, p in student.named_parameters()}


def test_accumulation_gives_the_same_gradient(tmp_path):
    config = opsd_config(tmp_path, global_batch=6, ce_weight=0.1, global_seed=3)
    loss, whole = gradients(config, 6)
    size = max(float(g.abs().max()) for g in whole.values())
    for micro_batch in (1, 4):  # 6 x 1, and 4 + 2
        again, parts = gradients(config, micro_batch)
        assert again == pytest.approx(loss, rel=1e-5)
        assert largest_difference(whole, parts) <= 1e-5 * size


def test_accumulation_gives_the_same_weights(tmp_path):
    for micro in (1, 4):
        run_opsd(tmp_path / str(micro), total_steps=3, micro_batch=micro, **LINEAR)
    one, four = (weights_of(tmp_path / str(micro), 3) for micro in (1, 4))
    assert largest_difference(one, four) <= 1e-5
    assert largest_difference(one, weights_of(workspace() / "base")) > 1e-2


def test_equal_contexts_and_weights_give_exactly_nothing(tmp_path, monkeypatch):
    def without_visual_thoughts(example, processor, *_):
        return rollout.student_context(example, processor)

    flags = {"teacher_mode": "self", "total_steps": 3}
    monkeypatch.setattr(rollout, "teacher_context", without_visual_thoughts)
    lines = run_opsd(tmp_path / "same", **flags)
    assert [(line["loss"], line["grad_norm"], line["clipped_share"]) for line in lines] == [
        (0, 0, 0)
    ] * 3
    after, before = weights_of(tmp_path / "same", 3), weights_of(workspace() / "base")
    assert largest_difference(after, before) == 0
    monkeypatch.undo()
    lines = run_opsd(tmp_path / "real", **flags)
    assert all(line["loss"] > 1e-4 and line["grad_norm"] > 1e-3 for line in lines)


@pytest.mark.parametrize("kind", ["jsd", "tinker"])
def test_a_placeholder_weighs_nothing(tmp_path, kind):
    config = opsd_config(tmp_path, jsd_loss_kind=kind, ce_weight=0.5)
    idle = [placeholder(draws(config)[0][1], base_processor())]
    student = load_pretrained(workspace() / "base")
    other = load_pretrained(workspace() / "base")
    nn.init.normal_(other.language_model.lm_head.weight)
    special = base_processor().tokenizer.special
    scored = opsd.distillation(student, FixedTeacher(other), idle, 0, config.distill, special, CPU)
    assert float(scored["loss"].detach()) == 0
    scored["loss"].backward()
    assert all(not p.grad.any() for p in student.parameters())  # zero, but there: DDP waits for it


def test_every_rank_runs_the_same_number_of_micro_batches():
    idle = ["placeholder"]
    for found in range(7):
        micros = opsd.micro_batches(list(range(found)), 6, 4, idle)
        assert len(micros) == 2
        assert [x for micro in micros if micro is not idle for x in micro] == list(range(found))
        assert all(micros)


def test_rows_over_the_cap_and_empty_completions_are_counted_apart(tmp_path, monkeypatch):
    def without_row_two(rows, *args):
        return [prompt for prompt in prepare(rows, *args) if prompt.row != 2]

    def without_row_five_and_six(*args):
        return [t for t in sample(*args) if t.prompt.row not in (5, 6)]

    monkeypatch.setattr(opsd, "prepare", without_row_two)
    monkeypatch.setattr(opsd, "sample", without_row_five_and_six)
    (line,) = run_opsd(tmp_path, total_steps=1, global_batch=8)
    assert (line["over_cap"], line["empty_completions"]) == (1 / 8, 2 / 8)


def test_damaged_visual_thoughts_are_counted_per_row(tmp_path):
    torn, rows = cell(png(3)[:40]), []
    for index in range(4):  # one, two and no damaged ones beside a good one
        damaged = {f"reasoning_image_{1 + i}": torn for i in range((1, 2, 0, 0)[index])}
        rows.append(
            record(index, **{"reasoning_image_1": None, "reasoning_image_2": None, **damaged})
        )
    write_source(tmp_path / "datasets", "Toy", rows)
    mixture = tmp_path / "toy.yaml"
    mixture.write_text("visual_opsd: {dataset_names: [Toy]}\n")
    flags = {"dataset_config_file": mixture, "data_root": tmp_path / "datasets"}
    (line,) = run_opsd(tmp_path, total_steps=1, **flags)
    assert (line["skipped_vts"], line["skipped_records"]) == (3 / 4, 0)


@pytest.mark.parametrize(("temperature", "calls"), [(0.0, 1), (1.0, 1 + rollout.MAX_RESAMPLES)])
def test_greedy_decoding_does_not_write_an_empty_row_again(
    tmp_path, monkeypatch, temperature, calls
):
    seen = []

    def nothing(model, contexts, tokenizer, params, seeds, budgets, workspace):
        seen.append(len(contexts))
        return [Rollout((Round((), "eos", (0.0,)),)) for _ in contexts]

    monkeypatch.setattr(rollout, "generate", nothing)
    config, processor = opsd_config(tmp_path), base_processor()
    prompts = prepare(draws(config), processor, config.sampling, 0, 5, False)
    assert sample(None, prompts, processor, SamplingParams(8, temperature), 0, 5) == []
    assert seen == [len(prompts)] * calls


def test_dropped_rows_change_no_mean(tmp_path, monkeypatch):
    """Two of four rows are left out: micro batches of one then run placeholders, of four none."""

    def two_rows(*args):
        return prepare(*args)[:2]

    monkeypatch.setattr(opsd, "prepare", two_rows)
    lines = {m: run_opsd(tmp_path / str(m), total_steps=1, micro_batch=m)[0] for m in (1, 4)}
    assert lines[1].keys() == lines[4].keys()
    assert lines[1]["over_cap"] == 0.5
    assert lines[1]["empty_completions"] == 0
    for name, value in lines[4].items():
        assert lines[1][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


# ---- the gap by class of token ----------------------------------------------------------------


def two_rounds(row: int, *texts: str) -> rollout.Trajectory:
    """A trajectory whose rounds have these texts."""
    encode = base_processor().tokenizer.encode
    rounds = tuple(Round(tuple(ids := encode(t)), "eos", (0.0,) * len(ids)) for t in texts)
    return rollout.Trajectory(rollout.Prompt(row, [], [], 99), Rollout(rounds))


def test_values_go_to_the_class_of_the_predicted_token():
    """Over all rounds of a completion; rows of closing tokens go nowhere."""
    tokenizer = base_processor().tokenizer
    micro = [two_rounds(0, "<answer>the", " cat</answer>"), two_rounds(1, "the cat, 4")]
    expected, rows = {}, []
    for trajectory in micro:
        classes = iter(classes_of(trajectory.rollout.token_ids, tokenizer))
        for part in trajectory.rollout.rounds:
            for _ in part.token_ids:
                expected.setdefault(f"k/{next(classes)}", []).append(float(len(rows)))
                rows.append(float(len(rows)))
            rows.append(1e9)  # a closing token
    found = rollout.values_by_class("k", torch.tensor(rows), micro, TokenClassifier(tokenizer))
    assert {name: part.tolist() for name, part in found.items()} == expected
    assert set(expected) == {f"k/{c}" for c in CLASSES}
    start = len(tokenizer.encode("<answer>the")) + 1  # of the second round, which goes on in it
    assert start in expected["k/answer"]


def test_the_gap_by_class_is_a_mean_over_tokens(tmp_path, monkeypatch):
    """Over all micro batches of a line, whatever completion a token is in."""
    pooled = {}

    def noted(student, teacher, micro, *rest):
        scored = distillation(student, teacher, micro, *rest)
        values = iter(scored["k_gen"].tolist())
        for trajectory in micro:
            classes = iter(classes_of(trajectory.rollout.token_ids, base_processor().tokenizer))
            for part in trajectory.rollout.rounds:
                for _ in part.token_ids:
                    pooled.setdefault(f"k_gen_of/{next(classes)}", []).append(next(values))
                next(values)
        return scored

    distillation = opsd.distillation
    monkeypatch.setattr(opsd, "distillation", noted)
    flags = {"global_batch": 6, "micro_batch": 4, "log_every": 2, "launch_gates": False}
    (line,) = run_opsd(tmp_path, total_steps=2, **flags)
    found = {name: value for name, value in line.items() if name.startswith("k_gen_of/")}
    assert found == pytest.approx({n: sum(v) / len(v) for n, v in pooled.items()}, rel=1e-6)
    assert len(found) >= 3 and len({round(v, 6) for v in found.values()}) == len(found)


def test_the_policy_loss_has_no_gap(tmp_path):
    (line,) = run_opsd(tmp_path, total_steps=1, jsd_loss_kind="tinker")
    assert not [name for name in line if name.startswith("k_gen")]
    assert line["sentinel"] == 0


# ---- runs -------------------------------------------------------------------------------------


def test_loss_falls_on_a_fixed_batch(tmp_path):
    mixture = tmp_path / "four.yaml"
    mixture.write_text("visual_opsd: {dataset_names: [Jigsaw_Assembly], num_used_data: [4]}\n")
    lines = run_opsd(
        tmp_path,
        dataset_config_file=mixture,
        total_steps=30,
        lr=5e-3,
        schedule="constant",
        teacher_mode="fixed",
        jsd_token_clip=0,
        jsd_top_k=0,
    )
    assert len(lines) == 30
    first, last = (sum(line["jsd"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.8 * first


def test_noise_changes_the_teacher_side_only(tmp_path, monkeypatch):
    seen = {}

    def spy(*args):
        trajectories = sample(*args)
        seen.setdefault(noise, trajectories)
        return trajectories

    monkeypatch.setattr(opsd, "sample", spy)
    losses = {}
    for noise in (False, True):
        losses[noise] = run_opsd(tmp_path / str(noise), total_steps=1, noise_vt=noise)[0]
    assert [t.rollout for t in seen[True]] == [t.rollout for t in seen[False]]
    assert [t.prompt.row for t in seen[True]] == [t.prompt.row for t in seen[False]]
    for name in ("student_entropy", "completion_length", "image_skips"):
        assert losses[True][name] == losses[False][name]
    assert abs(losses[True]["loss"] / losses[False]["loss"] - 1) > 0.01


def test_generation_weights_are_carried_over_bit_for_bit(tmp_path):
    run_opsd(tmp_path, total_steps=1)
    before = weights_of(workspace() / "base")
    generation = {key for key in before if is_generation_key(key)}
    assert len(generation) > 20
    for name in ("model", "ema"):
        after = weights_of(tmp_path, 1, name)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in generation)
    moved = [key for key in before.keys() - generation if not torch.equal(before[key], after[key])]
    assert len(moved) > 20


def test_a_run_is_reproducible_and_depends_on_its_seeds(tmp_path):
    runs = {
        name: run_opsd(tmp_path / name, **flags)
        for name, flags in {
            "one": {},
            "again": {"num_workers": 1},
            "sampling": {"global_seed": 1},
            "records": {"data_seed": 1},
        }.items()
    }
    assert runs["again"] == runs["one"]
    assert (
        largest_difference(weights_of(tmp_path / "one", 2), weights_of(tmp_path / "again", 2)) == 0
    )
    assert runs["sampling"] != runs["one"]
    assert runs["records"] != runs["one"]


def test_command_line_run_leaves_metrics_config_and_checkpoints(tmp_path, monkeypatch, capsys):
    flags = {"total_steps": 5, "log_every": 2, "save_every": 3, "warmup_steps": 2, "lr": 4e-4}
    argv = opsd_argv(tmp_path, **flags)
    monkeypatch.setattr(sys, "argv", ["opsd.py", *argv])
    opsd.main()
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 4, 5]
    names = {
        *("step", "loss", "lr", "grad_norm", "jsd", "student_entropy", "student_mass_outside"),
        *("clipped_share", "over_cap", "empty_completions", "completion_length", "ended_by_budget"),
        *("image_skips", "shrunk_images", "skipped_records", "skipped_vts", "teacher_drift"),
        *("k_gen", "tokens_per_second", "peak_memory_mib", "sentinel"),
    }
    lines = all_lines(tmp_path)
    assert all(names <= line.keys() for line in lines)
    parts = {name for line in lines for name in line if "/" in name}
    assert parts <= {f"k_gen/{t}" for t in TASKS} | {f"k_gen_of/{c}" for c in CLASSES}
    assert {name.partition("/")[0] for name in parts} == {"k_gen", "k_gen_of"}
    assert all(
        line[name] > 0 for line in lines for name in ("tokens_per_second", "peak_memory_mib")
    )
    assert all(math.isfinite(line[name]) for line in lines for name in names)
    # the rate used by the update that completed the step
    assert lines[0]["lr"] == pytest.approx(4e-4)
    assert lines[2]["lr"] == pytest.approx(
        1e-7 + (4e-4 - 1e-7) * 0.5 * (1 + math.cos(math.pi * 2 / 3))
    )
    saved = yaml.safe_load((tmp_path / "results" / "config.yaml").read_text())
    assert saved == dataclasses.asdict(opsd_config(tmp_path, **flags))
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["0000003", "0000005", "latest"]
    out = capsys.readouterr().out
    assert f"opened {workspace() / 'base' / 'model.safetensors'}" in out
    assert f"saved {tmp_path / 'checkpoints' / '0000005'}" in out


def test_a_step_without_any_completion_stops_the_run(tmp_path):
    config = opsd_config(tmp_path, max_forward_tokens=30)
    with pytest.raises(UsageError, match="step 0: no record .* --max_forward_tokens 30 .* 4"):
        opsd.train(config, WORLD)
    assert not (tmp_path / "checkpoints").exists()


def test_activation_checkpointing_changes_nothing(tmp_path):
    for value in (False, True):
        run_opsd(tmp_path / str(value), activation_checkpointing=value, **LINEAR)
    off, on = (weights_of(tmp_path / str(value), 2) for value in (False, True))
    assert largest_difference(off, on) <= 1e-6
