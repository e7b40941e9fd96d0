"""Schedule, AdamW, gradient clipping and the guard against non-finite steps."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from train.optim import (
    NonFiniteError,
    OptimConfig,
    build_optimizer,
    check_finite,
    clip_grad_norm,
    lr_at,
    set_lr,
)

GOLDEN = json.loads((Path(__file__).parent / "data" / "optim_golden.json").read_text())


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (GOLDEN["cosine_min_lr"]["lr_used_at_step"], OptimConfig(warmup_from_zero=True)),
        (GOLDEN["cosine_total2000"], OptimConfig(warmup_from_zero=True, total_steps=2000)),
        (GOLDEN["constant_warmup"], OptimConfig(warmup_from_zero=True, schedule="constant")),
    ],
)
def test_golden_schedules(values, config):
    # Beyond total_steps the golden cosine climbs again; ours stays at the floor (next test).
    inside = {int(step): lr for step, lr in values.items() if int(step) <= config.total_steps}
    assert len(inside) >= 9
    for step, expected in inside.items():
        assert lr_at(step, config) == pytest.approx(expected, rel=1e-9, abs=1e-20), step


def test_schedule_stays_at_the_floor_after_the_end():
    config = OptimConfig()
    assert [lr_at(step, config) for step in (1000, 1001, 1050, 5000)] == [1e-7] * 4
    assert lr_at(999, config) > 1e-7


def test_default_warmup_reaches_every_update():
    config = OptimConfig(lr=1e-3, warmup_steps=4, total_steps=10)
    rates = [lr_at(step, config) for step in range(6)]
    assert rates[:5] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert rates[5] < 1e-3
    assert lr_at(0, replace(config, warmup_from_zero=True)) == 0.0
    # From the end of the warm-up on the two readings are one schedule.
    for step in range(4, 12):
        assert lr_at(step, config) == lr_at(step, replace(config, warmup_from_zero=True))


def test_cosine_has_its_middle_between_lr_and_floor():
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=0, total_steps=8)
    assert lr_at(0, config) == 1.0
    assert lr_at(4, config) == pytest.approx(0.6)
    assert lr_at(2, config) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert lr_at(8, config) == pytest.approx(0.2)
    assert lr_at(3, OptimConfig(lr=1.0, warmup_steps=3, total_steps=3, min_lr=0.5)) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_lr": 1e-3}, "min_lr=0.001 must lie between"),
        ({"beta2": 1.0}, "beta2=1.0 is outside"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be positive"),
        ({"schedule": "linear"}, "schedule='linear'; choose cosine or constant"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 must lie between 0 and total_steps=1000"),
    ],
)
def test_config_rejects(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**wrong)


def test_adamw_first_update_in_closed_form():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    frozen = nn.Parameter(torch.tensor([3.0]), requires_grad=False)
    optimizer = build_optimizer([weight, frozen], lr=0.1, weight_decay=0.5)
    (group,) = optimizer.param_groups
    assert [p is weight for p in group["params"]] == [True]
    assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-15)
    set_lr(optimizer, 0.01)
    weight.grad = torch.tensor([5.0, -1e-9])  # with eps 1e-15 even this one is a full step
    optimizer.step()
    expected = [1.0 * (1 - 0.005) - 0.01, -2.0 * (1 - 0.005) + 0.01]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert frozen.tolist() == [3.0]


def test_optimizer_needs_something_to_train():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer([nn.Parameter(torch.ones(1), requires_grad=False)])


def test_clip_scales_to_the_limit_and_returns_the_norm_before():
    module = nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_grad_norm(module, 10.0).item() == pytest.approx(5.0)
    assert module.bias.grad.item() == 4.0
    assert clip_grad_norm(module, 1.0).item() == pytest.approx(5.0)
    assert module.weight.grad[0, 0].item() == pytest.approx(0.6, rel=1e-5)
    assert module.bias.grad.item() == pytest.approx(0.8, rel=1e-5)


def test_non_finite_values_are_named_with_their_step():
    check_finite(3, loss=0.5, grad_norm=1e30)
    with pytest.raises(NonFiniteError, match=r"step 7: grad_norm=nan; the update was not applied"):
        check_finite(7, loss=0.5, grad_norm=float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 8: loss=-inf, grad_norm=inf.* lower --lr"):
        check_finite(8, loss=-math.inf, grad_norm=math.inf)
