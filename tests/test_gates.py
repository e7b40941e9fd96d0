"""Launch gates: they hold on a sound run, leave no trace, and stop one that is broken."""

import dataclasses

import pytest
import torch

from data import contexts
from modeling import generation
from modeling.bagel import Bagel
from tests.training import largest_difference, metric_lines, run_opsd, weights_of
from train import gates, opsd, rollout
from train.gates import GateError
from train.records import read_records


def run(folder, **flags):
    flags = {"total_steps": 1, "global_batch": 8, "micro_batch": 8} | flags
    return run_opsd(folder, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"global_seed": 1},
        {"global_seed": 2, "micro_batch": 3, "sample_max_new_tokens": 5},
        {"jsd_loss_kind": "tinker", "ce_weight": 0.5},
        {"compute_dtype": "bfloat16"},
        {"jsd_top_k": 0, "jsd_token_clip": 0, "sample_temperature": 0.7},
    ],
)
def test_they_hold_on_a_sound_run_and_leave_a_record(tmp_path, flags):
    run(tmp_path, **flags)
    (record,) = read_records(tmp_path / "results" / "gates.jsonl")
    values = record["values"]
    assert (record["kind"], values["passed"], values["problems"]) == ("launch_gates", True, [])
    assert values["tokens"] > 10
    assert abs(values["loss"]) <= 1e-6 < values["real_grad_norm"]
    worst, limit = values["replay_worst"], 0.15 if "compute_dtype" in flags else 1e-4
    assert worst["recorded"] == pytest.approx(worst["student"], abs=limit)


def test_they_leave_no_trace(tmp_path):
    flags = {"total_steps": 3, "teacher_mode": "ema", "ema_decay": 0.5}
    run(tmp_path / "with", **flags)
    run(tmp_path / "without", **flags, launch_gates=False)
    assert metric_lines(tmp_path / "with") == metric_lines(tmp_path / "without")
    same = [weights_of(tmp_path / name, 3) for name in ("with", "without")]
    assert largest_difference(*same) == 0
    assert not (tmp_path / "without" / "results" / "gates.jsonl").exists()


def shifted_labels(monkeypatch):
    def pack_shifted(samples, tokens):
        batch = packer(samples, tokens)
        return dataclasses.replace(batch, labels=batch.labels.roll(1))

    packer = opsd.pack
    for module in (opsd, gates):
        monkeypatch.setattr(module, "pack", pack_shifted)


def dropped_turn_token(monkeypatch):
    whole = contexts.completion
    monkeypatch.setattr(rollout, "completion", lambda rounds: whole([sum(map(tuple, rounds), ())]))


def other_prompt(monkeypatch):
    whole = rollout.teacher_context

    def without_system(*args, **kwargs):
        return whole(*args, **kwargs)[1:]

    monkeypatch.setattr(rollout, "teacher_context", without_system)


def dropout(monkeypatch):
    forward = Bagel.forward

    def noisy(self, batch, *args, head=None, **kwargs):
        def dropping(hidden, lm_head):
            return head(torch.nn.functional.dropout(hidden, 0.1), lm_head)

        return forward(self, batch, *args, head=head and dropping, **kwargs)

    monkeypatch.setattr(Bagel, "forward", noisy)


def wrong_logprobs(monkeypatch):
    honest = generation.Round

    def boastful(token_ids, ended_by, logprobs, *rest):
        return honest(token_ids, ended_by, tuple(p / 2 for p in logprobs), *rest)

    monkeypatch.setattr(generation, "Round", boastful)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (shifted_labels, "replay parity: row"),
        (dropped_turn_token, "a turn token, a round or a label .* is missing"),
        (other_prompt, "zero gap: equal weights and contexts"),
        (dropout, "zero gap: equal weights and contexts"),
        (wrong_logprobs, "was sampled with log-prob"),
    ],
)
def test_a_broken_run_is_stopped_before_its_first_update(tmp_path, monkeypatch, fault, said):
    fault(monkeypatch)
    with pytest.raises(GateError, match=f"step 0, launch gate.*{said}"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    (record,) = read_records(tmp_path / "results" / "gates.jsonl")
    assert record["values"]["passed"] is False and record["values"]["problems"]
