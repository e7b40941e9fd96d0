"""Schedule, AdamW, gradient clipping and the guard against non-finite steps."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from tests.training import largest_difference, opsd_config, run_opsd, weights_of
from train import moments
from train.config import UsageError
from train.moments import HostAdamW
from train.optim import (
    NonFiniteError,
    OptimConfig,
    build_optimizer,
    check_finite,
    clip_grad_norm,
    lr_at,
    set_lr,
)
from train.session import open_optimizer

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
        ({"adam_moments": "disk"}, "adam_moments='disk'; choose resident or host"),
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


# ---- moments in host memory -------------------------------------------------------------------

SHAPES = [(7, 5), (3,), (1,), (40, 3), (11,), ()]
BUCKETS = [1, 8, 35, 64, 10_000]  # smaller than, as large as, and larger than a parameter


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Some parameters have none in some steps."""
    generator = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = None if (index + step) % 4 == 0 else gradient


def both(bucket: int, steps: int, device: str = "cpu"):
    """The same updates, streamed in buckets and not."""
    one, two = parameters(device), parameters(device)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}
    options["fused"] = device == "cuda" or None
    optimizers = torch.optim.AdamW(one, **options), HostAdamW(two, bucket=bucket, **options)
    for step in range(steps):
        for params, optimizer in zip((one, two), optimizers, strict=True):
            set_lr(optimizer, 1e-2 / (1 + step))
            give_gradients(params, step)
            optimizer.step()
    return one, two, *optimizers


def same_states(one, two, resident, streamed) -> bool:
    return all(
        torch.equal(a, b)
        and all(torch.equal(value.cpu(), streamed.state[b][k].cpu()) for k, value in state.items())
        for a, b in zip(one, two, strict=True)
        if (state := resident.state[a])
    )


@pytest.mark.parametrize("bucket", BUCKETS)
def test_streamed_moments_are_the_resident_ones_bit_for_bit(bucket):
    one, two, resident, streamed = both(bucket, 7)
    assert same_states(one, two, resident, streamed)
    counts = {int(state["step"]) for state in streamed.state.values()}
    assert len(counts) > 1  # parameters without a gradient are not counted
    moved = zip(parameters(), two, strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in moved) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", BUCKETS)
def test_streamed_moments_on_a_gpu_are_the_resident_ones_bit_for_bit(bucket):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    one, two, resident, streamed = both(bucket, 20, "cuda")
    assert same_states(one, two, resident, streamed)
    assert all(state["exp_avg"].is_pinned() for state in streamed.state.values())


def test_streamed_moments_are_saved_and_loaded_in_place():
    one, two, resident, streamed = both(8, 3)
    fresh = HostAdamW(parameters(), bucket=64, lr=1.0)
    places = [state["exp_avg"].data_ptr() for state in fresh.state.values()]
    fresh.load_state_dict(resident.state_dict())
    assert [state["exp_avg"].data_ptr() for state in fresh.state.values()] == places
    assert fresh.param_groups[0]["lr"] == resident.param_groups[0]["lr"] == 1e-2 / 3
    again = fresh.param_groups[0]["params"]
    with torch.no_grad():
        for mine, theirs in zip(again, one, strict=True):
            mine.copy_(theirs)
    for step in range(3, 6):
        for params, optimizer in ((one, resident), (again, fresh)):
            give_gradients(params, step)
            optimizer.step()
    assert same_states(one, again, resident, fresh)


class FakeStream:
    """Keeps what it is given, in order: buckets to work on, and what to wait for before."""

    def __init__(self) -> None:
        self.work: list = []

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        self.work.append(event.after)


class FakeEvent:
    after: tuple = ()  # what has to be over

    def record(self, stream) -> None:
        self.after = (stream, stream.work[-1])


def test_a_bucket_waits_for_its_place_on_the_device(monkeypatch):
    own = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    lanes = moments._Lanes(torch.device("cuda"))
    bring, update, take = lanes.streams
    assert update is own
    for bucket in range(5):
        slot = bucket % moments.SLOTS
        for lane, stream in zip(
            (lanes.bringing, lanes.updating, lanes.taking), lanes.streams, strict=True
        ):
            with lane(slot):
                stream.work.append(bucket)
    for bucket in range(5):
        before = {
            name: stream.work[stream.work.index(bucket) - 1]
            for name, stream in (("bring", bring), ("update", update), ("take", take))
        }
        earlier = bucket - moments.SLOTS  # whose place it takes
        assert before["bring"] == ((take, earlier) if earlier >= 0 else ())
        assert before["update"] == (bring, bucket)
        assert before["take"] == (update, bucket)


def test_a_run_with_moments_in_host_memory_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "BUCKET", 1000)
    flags = {"total_steps": 4, "save_every": 2, "lr": 2e-3}
    resident = run_opsd(tmp_path / "resident", **flags)
    assert run_opsd(tmp_path / "host", **flags, adam_moments="host") == resident
    for earlier, kind in (("resident", "host"), ("host", "resident")):
        start = tmp_path / earlier / "checkpoints" / "0000002"
        where = tmp_path / f"{earlier}, {kind}"
        assert run_opsd(where, **flags, adam_moments=kind, resume=start) == resident[2:]
        ends = [weights_of(run, 4) for run in (where, tmp_path / "resident")]
        assert largest_difference(*ends) == 0


def test_sharded_moments_stay_on_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(FSDP, "fsdp_modules", lambda student: [student])
    config = opsd_config(tmp_path, adam_moments="host")
    with pytest.raises(UsageError, match="--adam_moments host: a run that shards its weights"):
        open_optimizer(nn.Linear(2, 2), config)


def test_host_moments_of_a_rank_without_a_share():
    """A parameter of no elements, as sharding leaves some, has no moments to load."""

    def made() -> HostAdamW:
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))]
        return HostAdamW(parameters, lr=0.1, fused=None, foreach=None)

    first, second = made(), made()
    for parameter in first.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.load_state_dict(first.state_dict())
    one, other = (optimizer.param_groups[0]["params"][0] for optimizer in (first, second))
    assert torch.equal(first.state[one]["exp_avg"], second.state[other]["exp_avg"])
    assert int(second.state[other]["step"]) == 1
