"""Launch gates: each fault stops the run at its first step; sound runs pass and keep no trace."""

import copy
import dataclasses
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from data.contexts import completion
from modeling import decoding, qwen2_mot, sequence
from modeling.pretrained import load_pretrained
from modeling.sequence import Text
from tests.training import (
    WORLD,
    base_processor,
    draws,
    metric_lines,
    opsd_argv,
    opsd_config,
    run_opsd,
    weights_of,
    workspace,
)
from train import gates, losses, opsd, rollout
from train.config import DistillArguments
from train.gates import Findings, GateError, Token, limits_for
from train.parallel import distributed
from train.records import read_records
from train.rollout import Trajectory, prepare, sample

FLAGS = {"total_steps": 1, "global_batch": 8, "micro_batch": 4}


# ---- faults -----------------------------------------------------------------------------------


def patched(monkeypatch, owner, name, change):
    """Replace owner.name by change(original)."""
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))


def label_shift(monkeypatch):
    def change(text):
        def shifted(builder, block, sample):
            text(builder, block, sample)
            if block.loss:
                rows = len(block.token_ids) + 1
                last = builder.labels[-rows:]
                builder.labels[-rows:] = last[1:] + last[:1]

        return shifted

    patched(monkeypatch, sequence._Builder, "_text", change)


def rounds_without_turn_tokens(monkeypatch):
    joined = property(lambda self: completion([self.rollout.token_ids]))
    monkeypatch.setattr(Trajectory, "completion", joined)


def another_turn_token(monkeypatch):
    """The second round is opened by a closing token; as many loss rows as before."""

    def change(text):
        def opened(builder, block, sample):
            second = builder.loss_sample[-1:] == [sample] and block.loss
            start = len(builder.token_ids)
            text(builder, block, sample)
            if second:
                builder.token_ids[start] = builder.tokens.eos

        return opened

    patched(monkeypatch, sequence._Builder, "_text", change)


def one_token_less(segments):
    *before, last = segments
    return [*before, Text(last.token_ids[:-1], last.loss)]


def other_prompt_when_scored(monkeypatch):
    student = property(lambda self: [*one_token_less(self.prompt.student), *self.completion])
    monkeypatch.setattr(Trajectory, "student", student)


def other_question_of_the_teacher(monkeypatch):
    def change(context):
        def changed(example, processor, *rest):
            example = dataclasses.replace(example, question=f"{example.question} ?")
            return context(example, processor, *rest)

        return changed

    patched(monkeypatch, rollout, "teacher_context", change)


def shorter_completion_of_the_teacher(monkeypatch):
    teacher = property(lambda self: [*self.prompt.teacher, *one_token_less(self.completion)])
    monkeypatch.setattr(Trajectory, "teacher", teacher)


def random_forward(monkeypatch, where):
    def change(forward):
        def dropped(layer, x, rope, plan, route=None, index=0, kv_cache=None, rows=None):
            x = forward(layer, x, rope, plan, route, index, kv_cache, rows)
            return F.dropout(x, 0.1) if where(kv_cache) else x

        return dropped

    patched(monkeypatch, qwen2_mot.MoTDecoderLayer, "forward", change)


def dropout_in_training(monkeypatch):
    random_forward(monkeypatch, lambda kv_cache: torch.is_grad_enabled())


def dropout_in_every_packed_forward(monkeypatch):
    random_forward(monkeypatch, lambda kv_cache: kv_cache is None)


def decoding_one_position_ahead(monkeypatch):
    def change(step):
        return lambda self, tokens, positions, *where: step(self, tokens, positions + 1, *where)

    patched(monkeypatch, decoding.DecodeStep, "__call__", change)


def other_weights_when_sampled(monkeypatch):
    """What a rollout copy that was not refreshed would do; one process has no copy."""

    def change(sample):
        @torch.no_grad()
        def stale(model, *rest):
            model = copy.deepcopy(model)
            model.language_model.model.norm.weight[::2] *= 1.1
            return sample(model, *rest)

        return stale

    patched(monkeypatch, opsd, "sample", change)


def teacher_rows_off_by_one(monkeypatch):
    def change(teacher_topk):
        def rolled(*args):
            kept = teacher_topk(*args)
            return losses.TeacherTopK(kept.ids.roll(1, 0), kept.logprobs.roll(1, 0))

        return rolled

    patched(monkeypatch, losses, "teacher_topk", change)


REPLAY, GAP = "replay parity: row", "zero gap: equal weights and contexts"
FAULTS = {
    label_shift: {REPLAY},
    rounds_without_turn_tokens: {REPLAY},
    another_turn_token: {REPLAY},
    other_prompt_when_scored: {REPLAY, GAP},
    other_question_of_the_teacher: {GAP},
    shorter_completion_of_the_teacher: {REPLAY},
    dropout_in_training: {REPLAY, GAP},
    dropout_in_every_packed_forward: {REPLAY, GAP},
    decoding_one_position_ahead: {REPLAY},
    other_weights_when_sampled: {REPLAY},
    teacher_rows_off_by_one: {GAP},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_stops_the_run(tmp_path, monkeypatch, fault, dtype):
    fault(monkeypatch)
    config = opsd_config(tmp_path, **FLAGS, compute_dtype=dtype)
    with (
        pytest.raises(GateError, match="^step 0, launch gate: ") as caught,
        distributed(config.model, 1, config.run.global_batch) as world,
    ):
        opsd.train(config, world)
    message = str(caught.value)
    assert {gate for gate in (REPLAY, GAP) if gate in message} == FAULTS[fault]
    assert "\n" not in message
    assert re.search(r"row \d.* position \d", message)
    assert metric_lines(tmp_path) == []
    assert not (tmp_path / "checkpoints").exists()
    (record,) = read_records(tmp_path / "results" / "gates.jsonl")
    assert record["values"]["passed"] is False
    assert "; ".join(record["values"]["problems"]) in message


def sampled_at(config, step=0):
    """What the run of `config` samples at `step` with the weights it starts from."""
    processor, seed = base_processor(), config.run.global_seed
    prompts = prepare(draws(config, step), processor, config.sampling, step, seed, False)
    model = load_pretrained(workspace() / "base")
    return sample(model, prompts, processor, config.sampling.params, step, seed)


def test_the_message_names_the_place_the_token_and_both_log_probs(tmp_path, monkeypatch):
    """One label of one row is another one: the third token of the longest completion."""
    longest = max(sampled_at(opsd_config(tmp_path, **FLAGS)), key=lambda t: len(t.rollout.logprobs))
    row, logprobs = longest.prompt.row, longest.rollout.logprobs
    tokens = gates.sampled_ids(longest, base_processor().tokenizer.special)
    other, labels_of = 7, rollout.sampled_labels
    assert tokens[2] != other

    def changed(batch, micro):
        labels = labels_of(batch, micro)
        for index, trajectory in enumerate(micro):
            if trajectory.prompt.row == row:
                labels[(batch.loss_sample == index).nonzero()[2, 0]] = other
        return labels

    monkeypatch.setattr(gates, "sampled_labels", changed)
    with pytest.raises(GateError) as caught:
        run_opsd(tmp_path, **FLAGS)
    found = re.search(
        r"row (\d+), position (\d+), token (\d+) \(scored as token (\d+)\) was sampled with "
        r"log-prob (\S+) and is scored with (\S+), (\S+) apart",
        str(caught.value),
    )
    assert [int(found[i]) for i in (1, 2, 3, 4)] == [row, 2, tokens[2], other]
    recorded, scored, apart = (float(found[i]) for i in (5, 6, 7))
    assert recorded == pytest.approx(logprobs[2], rel=1e-5)
    batch = sequence.pack([longest.student], base_processor().tokenizer.special)
    model = load_pretrained(workspace() / "base")
    with torch.no_grad():
        exact = model(batch, head=lambda h, head: head(h).double().log_softmax(-1))[2, other]
    assert scored == pytest.approx(float(exact), rel=1e-4)
    assert apart == pytest.approx(abs(recorded - scored), rel=0.05)


def test_the_command_line_shows_one_line(tmp_path, monkeypatch, capsys):
    label_shift(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["opsd.py", *opsd_argv(tmp_path, **FLAGS)])
    with pytest.raises(SystemExit) as exit_:
        opsd.main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 0, launch gate: replay parity: row ")


def test_gates_are_asked_again_after_a_resume(tmp_path, monkeypatch, capsys):
    flags = {**FLAGS, "total_steps": 3, "save_every": 1}
    run_opsd(tmp_path, **flags)
    run_opsd(tmp_path, **flags, resume=tmp_path / "checkpoints" / "0000001", overwrite=True)
    records = read_records(tmp_path / "results" / "gates.jsonl")
    assert [(r["step"], r["values"]["passed"]) for r in records] == [(0, True), (1, True)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "launch gates" in line]
    assert len(lines) == 2
    decoding_one_position_ahead(monkeypatch)
    with pytest.raises(GateError, match="^step 2, launch gate: replay parity: row "):
        run_opsd(tmp_path, **flags, resume=tmp_path / "checkpoints" / "0000002")
    records = read_records(tmp_path / "results" / "gates.jsonl")
    assert [(r["step"], r["values"]["passed"]) for r in records][2:] == [(2, False)]
    monkeypatch.undo()
    run_opsd(tmp_path, **flags, overwrite=True)  # an earlier run's records are not kept
    assert [r["step"] for r in read_records(tmp_path / "results" / "gates.jsonl")] == [0]


# ---- no false alarm ---------------------------------------------------------------------------

SOUND = {
    **{f"seed {seed}": {"global_seed": seed, "data_seed": seed} for seed in range(4)},
    "one row per forward": {"micro_batch": 1, "activation_checkpointing": True},
    "greedy": {"sample_temperature": 0},
    "other temperatures": {"sample_temperature": 1.6, "jsd_temperature": 2.0},
    "budgets of four": {"sample_max_new_tokens": 4},
    "no skips": {"sample_max_image_skips": 0},
    "noise": {"noise_vt": True, "teacher_mode": "self"},
    "shrunk": {"max_forward_tokens": 80, "sample_max_image_skips": 1},
    "plain KL": {"jsd_beta": 0, "jsd_token_clip": 0, "jsd_top_k": 0},
    "reverse KL, tail": {"jsd_beta": 1, "jsd_clip_mode": "off", "jsd_top_k_mode": "tail"},
    "policy loss": {"jsd_loss_kind": "tinker", "teacher_mode": "fixed"},
    "cross-entropy only": {"jsd_weight": 0, "ce_weight": 1},
    "cross-entropy too": {"ce_weight": 1, "jsd_clip_mode": "token"},
    **{
        f"bfloat16, {seed}": {"compute_dtype": "bfloat16", "global_seed": seed} for seed in range(4)
    },
    "bfloat16, plain KL": {"compute_dtype": "bfloat16", "jsd_beta": 0, "jsd_clip_mode": "off"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_passes(tmp_path, name):
    config = opsd_config(tmp_path, **{**FLAGS, **SOUND[name]})
    with distributed(config.model, 1, config.run.global_batch) as world:
        opsd.train(config, world)
    (record,) = read_records(tmp_path / "results" / "gates.jsonl")
    assert (record["kind"], record["step"], record["seed"]) == (
        *("launch_gates", 0),
        config.run.global_seed,
    )
    values = record["values"]
    assert values["passed"] is True
    assert values["problems"] == []
    assert values["tokens"] >= 8
    assert values["real_grad_norm"] > 1e-2  # what the gates would miss is not nothing
    if not name.startswith("bfloat16"):
        assert values["replay_mean"] <= 1e-5


def test_rows_with_skips_and_long_ones_are_checked(tmp_path, monkeypatch):
    checked = []
    patched(
        monkeypatch,
        gates,
        "without_gap",
        lambda cut: lambda trajectory: checked.append(trajectory) or cut(trajectory),
    )
    config = opsd_config(tmp_path, **FLAGS)
    run_opsd(tmp_path, **FLAGS)
    every = sampled_at(config)
    assert len(checked) == gates.ROWS < len(every)
    keys = [(t.rollout.skips, len(t.rollout.token_ids)) for t in every]
    assert sorted(keys)[-gates.ROWS :] == sorted(
        (t.rollout.skips, len(t.rollout.token_ids)) for t in checked
    )
    assert 1 in {t.rollout.skips for t in checked}
    assert {t.ends_open for t in checked} == {False, True}


# ---- no trace ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ema", "self"])
def test_gates_leave_no_trace(tmp_path, monkeypatch, mode):
    def change(check):
        def watched(self, *args):
            before = [p.detach().clone() for p in self.student.parameters()]
            state = torch.get_rng_state()
            check(self, *args)
            after = list(self.student.parameters())
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
            assert all(p.grad is None for p in after)
            assert torch.equal(state, torch.get_rng_state())
            watched.calls += 1

        watched.calls = 0
        return watched

    patched(monkeypatch, gates.LaunchGates, "check", change)
    flags = {**FLAGS, "total_steps": 2, "teacher_mode": mode, "lr": 1e-2}
    lines = {on: run_opsd(tmp_path / str(on), **flags, launch_gates=on) for on in (True, False)}
    assert gates.LaunchGates.check.calls == 1
    assert lines[True] == lines[False]
    assert not (tmp_path / "False" / "results" / "gates.jsonl").exists()
    for name in ("model", "ema") if mode == "ema" else ("model",):
        with_gates, without = (weights_of(tmp_path / str(on), 2, name) for on in (True, False))
        assert all(torch.equal(with_gates[key], without[key]) for key in without)


# ---- limits -----------------------------------------------------------------------------------


def findings(**changes):
    token = Token(3, 5, 7, 7, -1.0, -1.0, -1.0)
    apart = changes.pop("apart", 0.0)
    worst = dataclasses.replace(token, recorded=-1.0 - apart)
    values = {
        **{"loss": 0.0, "grad_norm": 0.0, "real_loss": 0.5, "real_grad_norm": 2.0},
        **{"tokens": 9, "replay_mean": 0.0, "replay_worst": worst, "gap_worst": token},
    }
    return Findings(**{**values, **changes})


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "beta", "name", "limit"),
    [
        (FP32, 0.5, "loss", 1e-6),
        (FP32, 0.5, "grad_norm", 1e-6),
        (FP32, 0.0, "loss", 1e-5 * 0.5),
        (FP32, 1.0, "grad_norm", 1e-5 * 2),
        (FP32, 0.5, "apart", 1e-4),
        (FP32, 0.5, "replay_mean", 1e-4),
        (BF16, 0.5, "loss", 1e-3 * 0.5),
        (BF16, 0.5, "grad_norm", 1e-3 * 2),
        (BF16, 0.0, "grad_norm", 1e-3 * 2),
        (BF16, 0.5, "apart", 0.15),
        (BF16, 0.5, "replay_mean", 0.02),
    ],
)
def test_limits(dtype, beta, name, limit):
    limits = limits_for(dtype, DistillArguments(jsd_beta=beta, jsd_clip_mode="token"))
    gate = "zero gap" if name in ("loss", "grad_norm") else "replay parity"
    assert findings(**{name: 0.99 * limit}).failures(limits) == []
    for beyond in (1.01 * limit, math.inf, math.nan):
        (problem,) = findings(**{name: beyond}).failures(limits)
        assert problem.startswith(f"{gate}: ")
        assert "row 3, position 5, token 7" in problem
    if name == "loss":  # of either sign
        assert len(findings(loss=-1.01 * limit).failures(limits)) == 1


def test_not_a_number_is_the_worst_token():
    sound, broken = Token(0, 0, 1, 1, -1.0, -2.0, -1.0), Token(0, 1, 1, 1, -1.0, math.nan, -1.0)
    assert (sound.replay, sound.gap) == (1.0, 1.0)
    assert (broken.replay, broken.gap) == (math.inf, math.inf)


def test_a_missing_row_is_agreed_on_by_all_ranks(tmp_path, monkeypatch):
    """Another rank's problem stops this one before it would wait in a forward."""
    text = "replay parity: row 5 of another rank"
    monkeypatch.setattr(gates, "gather_from_ranks", lambda mine: [mine, [text]])
    scored = []
    monkeypatch.setattr(opsd, "distillation", lambda *args: scored.append(args))
    with pytest.raises(GateError, match=text):
        opsd.train(opsd_config(tmp_path, **FLAGS), WORLD)
    assert scored == []
