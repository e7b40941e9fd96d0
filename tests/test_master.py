"""Float32 masters of bfloat16 compute weights: what they keep, what they cost, and that without
rounding they change nothing.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from modeling.pretrained import is_generation_key, load_pretrained
from modeling.sequence import Text, pack
from tests.training import (
    WORLD,
    base_processor,
    drawing_base,
    drawing_flags,
    largest_difference,
    metric_lines,
    opsd_config,
    run_opsd,
    sft_config,
    weights_of,
    workspace,
)
from train import opsd, sft
from train.master import MasterWeights, RoundedForward
from train.optim import build_optimizer, clip_grad_norm
from train.parallel import RolloutCopy, StudentItself, full_params, full_state, rollout_model, wrap
from train.session import open_optimizer
from train.state import Progress, load_state, save_state
from train.teacher import EMATeacher, squared_distance

NARROW = torch.bfloat16
BF16 = dataclasses.replace(WORLD, compute_dtype=NARROW)
EPS = 2.0**-8  # distance of neighbours in bfloat16 just below 1


class Net(nn.Module):
    """Uses its head twice, so that a backward pass has two contributions to one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x)) + self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs(step: int, micro: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + micro))


def update(student, optimizer, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One update from two micro batches; the gradient norm."""
    for micro in range(2):
        student(inputs(step, micro).to(dtype)).float().square().mean().backward()
    norm = clip_grad_norm(student, 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def base(world=BF16) -> nn.Module:
    return wrap(load_pretrained(workspace() / "base"), world)


def optimizer_of(student, **flags):
    """As the trainers open it."""
    return open_optimizer(student, opsd_config(workspace(), lr=1e-2, **flags))


def a_batch():
    return pack([[Text((5, 6, 7, 8), loss=True)]], base_processor().tokenizer.special)


def learn(student, optimizer) -> None:
    """An update that moves every parameter."""
    logits = student(a_batch(), head=lambda hidden, lm_head: lm_head(hidden))
    everything = sum(p.float().sum() for p in StudentItself(student).model.parameters())
    (logits.float().square().mean() + 1e-3 * everything).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- exactness ----------------------------------------------------------------------------------


def test_in_float32_masters_are_plain_adamw_bit_for_bit():
    plain, student = net(), MasterWeights(net(), torch.float32)
    one, two = (build_optimizer(m.parameters(), 1e-2, weight_decay=0.1) for m in (plain, student))
    two.register_step_post_hook(lambda *_: student.publish())
    for step in range(5):
        assert torch.equal(update(plain, one, step), update(student, two, step))
        for expected, master, weight in zip(
            plain.parameters(), student.parameters(), student.compute.parameters(), strict=True
        ):
            assert torch.equal(expected, master) and torch.equal(master, weight)
            assert master.data_ptr() != weight.data_ptr()


def test_a_whole_run_through_masters_of_float32_is_the_plain_one(tmp_path, monkeypatch):
    flags = {"total_steps": 3, "micro_batch": 2, "ema_decay": 0.5, "ce_weight": 0.1}
    plain = run_opsd(tmp_path / "plain", **flags)

    def through_masters(model, world, trained=True):
        return MasterWeights(model, torch.float32) if trained else wrap(model, world)

    monkeypatch.setattr(opsd, "wrap", through_masters)
    assert run_opsd(tmp_path / "masters", **flags) == plain
    for name in ("model", "ema"):
        one, two = (weights_of(tmp_path / run, 3, name) for run in ("plain", "masters"))
        assert largest_difference(one, two) == 0
    assert largest_difference(one, weights_of(workspace() / "base")) > 1e-4


def test_bfloat16_gradients_are_near_and_their_sum_is_float32():
    plain, student = net(), MasterWeights(net(), NARROW)
    separate = []
    for micro in range(2):
        plain(inputs(0, micro)).square().mean().backward()
        rounded = copy.deepcopy(student.compute)
        rounded(inputs(0, micro).bfloat16()).float().square().mean().backward()
        separate.append([p.grad.float() for p in rounded.parameters()])
        student(inputs(0, micro).bfloat16()).float().square().mean().backward()
        assert all(p.grad is None for p in student.compute.parameters())
    sums = zip(plain.parameters(), student.parameters(), *separate, strict=True)
    for exact, master, first, second in sums:
        assert master.grad.dtype == torch.float32
        assert torch.equal(master.grad, first + second)
        error = (master.grad - exact.grad).norm() / exact.grad.norm()
        assert error < 4 * EPS  # a few roundings on the way


def test_bfloat16_training_stays_close_to_float32():
    plain, student = net(), MasterWeights(net(), NARROW)
    one, two = (build_optimizer(m.parameters(), 1e-2, eps=1.0) for m in (plain, student))
    two.register_step_post_hook(lambda *_: student.publish())
    start = [p.detach().clone() for p in plain.parameters()]
    for step in range(10):
        update(plain, one, step), update(student, two, step, NARROW)
    for before, exact, master in zip(start, plain.parameters(), student.parameters(), strict=True):
        moved = (exact - before).norm()
        assert moved > 0
        assert (master - exact).norm() < 4 * EPS * moved


# ---- what a bfloat16 weight alone would lose ----------------------------------------------------


def test_updates_below_the_resolution_add_up():
    """A constant gradient moves by lr each time: bfloat16 would round 31 of these away, all of
    them one by one.
    """
    lr = 2.0**-14
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    alone = copy.deepcopy(module).bfloat16()
    student = MasterWeights(module, NARROW)
    optimizers = [build_optimizer(m.parameters(), lr) for m in (student, alone)]
    optimizers[0].register_step_post_hook(lambda *_: student.publish())
    one = torch.ones(1, 1, dtype=NARROW)
    for step in range(1, 41):
        for model, optimizer in zip((student, alone), optimizers, strict=True):
            model(one).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert student.module.weight.item() == pytest.approx(1 - step * lr, abs=1e-6)
        if step * lr != EPS / 2:  # half way
            assert student.compute.weight.item() == (1.0 if step * lr < EPS / 2 else 1 - EPS)
        assert alone.weight.item() == 1.0


def test_the_teacher_follows_the_masters():
    decay, student = 0.5, base()
    teacher = EMATeacher(wrap(load_pretrained(workspace() / "base"), BF16, trained=False), decay)
    expected = {name: value.detach().clone() for name, value in full_params(student)}
    from_rounded = {name: value.clone() for name, value in expected.items()}
    optimizer = optimizer_of(student)
    for _ in range(3):
        learn(student, optimizer)
        teacher.update(student)
        for (name, master), weight in zip(
            full_params(student), student.compute.parameters(), strict=True
        ):
            expected[name].lerp_(master.detach(), 1 - decay)
            from_rounded[name].lerp_(weight.detach().float(), 1 - decay)
    average = {name: value.detach() for name, value in full_params(teacher.module)}
    assert all(value.dtype == torch.float32 for value in average.values())
    assert largest_difference(average, expected) == 0
    assert largest_difference(average, from_rounded) > 0
    squares, count = squared_distance(teacher.module, student)
    pairs = [(average[name], master) for name, master in full_params(student)]
    direct = sum(float((a.double() - m.detach().double()).square().sum()) for a, m in pairs)
    assert float(squares) == pytest.approx(direct, rel=1e-5)
    assert count == sum(m.numel() for _, m in pairs)


def test_exports_hold_the_masters():
    student = base()
    learn(student, optimizer_of(student))
    state = full_state(student, BF16)
    assert set(state) == {
        name for name, _ in load_pretrained(workspace() / "base").named_parameters()
    }
    head = state["language_model.lm_head.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    assert torch.equal(student.compute.language_model.lm_head.weight, head.bfloat16())


# ---- the compute weights ------------------------------------------------------------------------


def test_rollouts_run_on_the_compute_weights_themselves():
    for world in (WORLD, BF16):
        student = base(world)
        actor = rollout_model(student.module.config, student, world)
        assert isinstance(actor, StudentItself)
        assert actor.model.dtype == world.compute_dtype
        pointers = [p.data_ptr() for p in actor.model.parameters()]
        before = [p.detach().clone() for p in actor.model.parameters()]
        learn(student, optimizer_of(student))
        actor.refresh(student)
        assert [p.data_ptr() for p in actor.model.parameters()] == pointers
        assert all(p.requires_grad for p in actor.model.parameters())
        assert any(map(lambda a, b: not torch.equal(a, b), before, actor.model.parameters()))
        copied = RolloutCopy(student.module.config, world)
        copied.refresh(student)
        assert all(map(torch.equal, copied.model.parameters(), actor.model.parameters()))
    world = dataclasses.replace(WORLD, size=2)
    assert type(rollout_model(student.module.config, student, world)) is RolloutCopy


def share_storage(model) -> list[tuple[torch.Tensor, list[nn.Parameter]]]:
    """q, k, v of each layer as parts of one matrix, as fused decoding has them."""
    joined = []
    for layer in model.language_model.model.layers:
        parts = [getattr(layer.self_attn, f"{name}_proj").weight for name in ("q", "k", "v")]
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.data = rows
        joined.append((whole, parts))
    return joined


@pytest.mark.parametrize("world", [WORLD, BF16], ids=["float32", "bfloat16"])
def test_weights_may_share_storage_and_keep_it(tmp_path, world):
    student = base(world)
    optimizer = optimizer_of(student)
    joined = share_storage(StudentItself(student).model)
    progress = Progress({}, {}, {})
    for step in (1, 2):
        learn(student, optimizer)
        save_state(tmp_path / str(step), step, {}, {"student": student}, optimizer, progress, world)
    last = {name: value.detach().clone() for name, value in full_params(student)}
    load_state(tmp_path / "1", {}, {"student": student}, optimizer, world)
    first = {name: value.detach().clone() for name, value in full_params(student)}
    assert largest_difference(first, last) > 1e-3
    learn(student, optimizer)
    assert all(torch.equal(value, last[name]) for name, value in full_params(student))
    for whole, parts in joined:
        assert torch.equal(whole, torch.cat([part.detach() for part in parts]))
        assert parts[0].data_ptr() == whole.data_ptr()


def test_loading_rounds_into_the_compute_weights():
    student, other = base(), base()
    learn(other, optimizer_of(other))
    student.load_state_dict(other.state_dict())
    assert all(map(torch.equal, student.compute.parameters(), other.compute.parameters()))
    assert all(map(torch.equal, student.parameters(), other.parameters()))
    assert student.state_dict().keys() == base(WORLD).state_dict().keys()


def test_masters_need_float32():
    with pytest.raises(TypeError, match="body.0.weight is not float32: load the weights"):
        MasterWeights(net().bfloat16(), NARROW)


# ---- teachers -----------------------------------------------------------------------------------


def test_a_teacher_of_equal_weights_computes_what_the_student_does():
    student = base()
    teacher = wrap(load_pretrained(workspace() / "base"), BF16, trained=False)
    before = dict(teacher.named_parameters())
    with torch.no_grad():
        ours, theirs = student(a_batch()), teacher(a_batch())
    assert ours.dtype == NARROW
    assert torch.equal(ours, theirs)
    assert all(parameter is before[name] for name, parameter in teacher.named_parameters())
    assert {p.dtype for p in before.values()} == {torch.float32}


def test_rounded_units_are_dropped_also_after_an_error():
    model, seen = net(), []

    def watch(module, *_):
        seen.append([p.dtype for p in model.parameters()])
        raise RuntimeError("stop")

    before = list(model.parameters())
    RoundedForward(model, (Net, nn.Sequential), NARROW)
    handle = model.body[2].register_forward_hook(watch)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
        model(inputs(0, 0).bfloat16())
    assert seen == [[NARROW] * 6]
    assert all(map(lambda a, b: a is b, before, model.parameters()))
    handle.remove()
    model.head.register_forward_hook(lambda *_: seen.append([p.dtype for p in model.parameters()]))
    with torch.no_grad():
        out = model(inputs(0, 0).bfloat16())
        assert torch.equal(out, net().bfloat16()(inputs(0, 0).bfloat16()))
    assert seen[1] == [torch.float32] * 4 + [NARROW] * 2  # the inner unit is over
    with pytest.raises(ValueError, match="weight of Linear is in none of the units"):
        RoundedForward(net(), (nn.Sequential,), NARROW)


# ---- what is not trained ------------------------------------------------------------------------


def test_frozen_weights_are_exported_as_they_were(tmp_path):
    """The base of this test is float32: rounding its frozen weights would show."""
    flags = drawing_flags(freeze_und=True, total_steps=1, compute_dtype="bfloat16")
    sft.train(sft_config(tmp_path, **flags), BF16)
    before, after = weights_of(drawing_base()), weights_of(tmp_path, 1)
    und = [key for key in before if not is_generation_key(key)]
    assert all(torch.equal(before[key], after[key]) for key in und)
    assert any(not torch.equal(before[key], before[key].bfloat16().float()) for key in und)
    moved = [key for key in before if key not in und and not torch.equal(before[key], after[key])]
    assert len(moved) > 10


# ---- bytes --------------------------------------------------------------------------------------


def state_bytes(student: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, int]:
    """Bytes that a student and its optimizer keep by kind."""
    counted: dict[str, int] = {}

    def add(kind: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            counted[kind] = counted.get(kind, 0) + tensor.numel() * tensor.itemsize

    for parameter in student.parameters():
        add("weights", parameter)
        add("gradients", parameter.grad)
    if isinstance(student, MasterWeights):
        for parameter in student.compute.parameters():
            add("compute weights", parameter)
            add("gradients", parameter.grad)
    for state in optimizer.state.values():
        add("moments", state.get("exp_avg"))
        add("moments", state.get("exp_avg_sq"))
    return counted


TABLE = {  # per trained parameter, on the device unless said otherwise
    ("bfloat16", "resident"): {"weights": 4, "compute weights": 2, "gradients": 4, "moments": 8},
    ("bfloat16", "host"): {"weights": 4, "compute weights": 2, "gradients": 4, "moments": 8},
    ("float32", "resident"): {"weights": 4, "gradients": 4, "moments": 8},
    ("float32", "host"): {"weights": 4, "gradients": 4, "moments": 8},
}


@pytest.mark.parametrize(("dtype", "moments"), TABLE)
def test_bytes_per_trained_parameter(dtype, moments):
    world = dataclasses.replace(WORLD, compute_dtype=getattr(torch, dtype))
    student = base(world)
    optimizer = optimizer_of(student, adam_moments=moments)
    learn(student, optimizer)
    for parameter in StudentItself(student).model.parameters():
        parameter.sum().backward()
    count = sum(p.numel() for p in student.parameters())
    assert state_bytes(student, optimizer) == {
        kind: size * count for kind, size in TABLE[dtype, moments].items()
    }
    teacher = wrap(load_pretrained(workspace() / "base"), world, trained=False)
    assert sum(p.numel() * p.itemsize for p in teacher.parameters()) == 4 * count
    assert not any("moe_gen" in name for name, _ in full_params(student))  # zero bytes of it


def test_a_run_in_bfloat16_keeps_what_it_should(tmp_path):
    """Whole runs: exported masters move further than their rounding, EMA is apart from both."""
    flags = {"total_steps": 3, "ema_decay": 0.5, "compute_dtype": "bfloat16", "lr": 1e-3}
    opsd.train(opsd_config(tmp_path, **flags), BF16)
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2, 3]
    assert all(0 < line["teacher_drift"] < 1e-2 for line in metric_lines(tmp_path))
    model, ema = weights_of(tmp_path, 3), weights_of(tmp_path, 3, "ema")
    assert largest_difference(model, ema) > 0
    assert any(not torch.equal(value, value.bfloat16().float()) for value in model.values())


def test_a_copy_of_masters_is_refused():
    with pytest.raises(TypeError, match="wrap a copy of the module"):
        copy.deepcopy(MasterWeights(nn.Linear(2, 2), torch.bfloat16))
