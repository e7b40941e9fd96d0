"""The three teachers on plain modules, and the EMA over two FSDP ranks."""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from train.optim import clip_grad_norm
from train.teacher import EMATeacher, FixedTeacher, SelfTeacher, build_teacher, squared_distance

GOLDEN = json.loads((Path(__file__).parent / "data" / "optim_golden.json").read_text())["ema"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self.head(self.frozen(self.block(x)))


def move(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("decay", [0.9999, 0.995])
def test_golden_ema(decay):
    student, average = nn.Module(), nn.Module()
    average.w = nn.Parameter(torch.tensor(GOLDEN["start"]))
    student.w = nn.Parameter(torch.zeros(7))
    teacher = EMATeacher(average, decay)
    for values, expected in zip(GOLDEN["params"], GOLDEN["after_each"][str(decay)], strict=True):
        student.w.data = torch.tensor(values)
        teacher.update(student)
        torch.testing.assert_close(average.w.data, torch.tensor(expected), rtol=0, atol=1e-6)


def test_ema_closed_form_after_k_updates(student):
    teacher = build_teacher("ema", student, copy.deepcopy, decay=0.9)
    start = copy.deepcopy(student)
    move(student, 1.0)
    for _ in range(5):
        teacher.update(student)
    for name, average in teacher.module.named_parameters():
        before = start.get_parameter(name)
        moved = 0.0 if name.startswith("frozen") else 1 - 0.9**5
        torch.testing.assert_close(average, before + moved, rtol=0, atol=1e-6)
        assert not average.requires_grad
    assert student.head.weight.requires_grad


def test_ema_starts_equal_and_drifts(student):
    teacher = build_teacher("ema", student, copy.deepcopy)
    assert teacher.decay == 0.995
    count = 12 + 12 + 3
    assert squared_distance(teacher.module, student) == (0.0, count)
    move(student, 0.5)
    squares, again = squared_distance(teacher.module, student)
    assert (float(squares), again) == (pytest.approx(count * 0.25, rel=1e-6), count)
    assert squares.dtype == torch.float64 and not squares.requires_grad


def test_ema_averages_a_bfloat16_student_in_float32(student):
    teacher = EMATeacher(copy.deepcopy(student), 0.995)
    before = teacher.module.head.weight.clone()
    half = copy.deepcopy(student).bfloat16()
    move(half, 1.0)
    teacher.update(half)
    expected = 0.995 * before + 0.005 * half.head.weight.float()
    torch.testing.assert_close(teacher.module.head.weight.data, expected.data)
    with pytest.raises(TypeError, match="block.weight of the EMA teacher is torch.bfloat16"):
        EMATeacher(copy.deepcopy(half)).update(student)


def test_self_teacher_is_the_student(student):
    teacher = build_teacher("self", student, copy.deepcopy)
    assert isinstance(teacher, SelfTeacher)
    move(student, 1.0)
    teacher.update(student)
    assert teacher.module is student
    assert student.head.weight.requires_grad


def test_fixed_teacher_is_bit_identical_after_training(student):
    start = copy.deepcopy(student.state_dict())
    teacher = build_teacher("fixed", student, copy.deepcopy)
    assert isinstance(teacher, FixedTeacher)
    move(student, 1.0)
    teacher.update(student)
    for name, value in teacher.module.state_dict().items():
        assert torch.equal(value, start[name])
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_errors_name_what_is_wrong(student):
    with pytest.raises(ValueError, match="teacher_mode='mean'; choose self, ema or fixed"):
        build_teacher("mean", student, copy.deepcopy)
    with pytest.raises(ValueError, match=r"decay=1.0 is outside"):
        EMATeacher(copy.deepcopy(student), 1.0)
    smaller = copy.deepcopy(student)
    del smaller.head
    with pytest.raises(ValueError, match=r"differ in 1 parameters, e.g. head.weight"):
        EMATeacher(smaller).update(student)
    wider = copy.deepcopy(student)
    wider.head = nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match=r"head.weight is \(2, 3\) in the teacher and \(1, 3\)"):
        EMATeacher(wider).update(student)


# ---- two ranks ------------------------------------------------------------------------------


def shard(module: nn.Module, outer: bool) -> nn.Module:
    module = copy.deepcopy(module)
    module.block = FSDP(module.block, use_orig_params=True, device_id=torch.device("cpu"))
    module = FSDP(module, use_orig_params=True, device_id=torch.device("cpu"))
    # The outer unit owns nothing, so the one with head and frozen is not the root.
    return FSDP(module, use_orig_params=True, device_id=torch.device("cpu")) if outer else module


def two_rank_run(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check_sharded_updates()
    gc.collect()  # wrapped modules hold the process group, whose threads must not outlive Python
    dist.barrier()  # no rank leaves while another still communicates
    dist.destroy_process_group()


def check_sharded_updates() -> None:
    """Three updates of a sharded pair and of a plain pair; teacher outputs must agree."""
    torch.manual_seed(0)
    plain = Net()
    sharded = shard(plain, outer=True)
    pairs = [
        (plain, EMATeacher(copy.deepcopy(plain), 0.5)),
        (sharded, EMATeacher(shard(plain, outer=True), 0.5)),
    ]
    with pytest.raises(ValueError, match=r"owns 3 parameters, e.g. frozen.weight"):
        EMATeacher(shard(plain, outer=False))
    sizes = [parameter.numel() for parameter in sharded.parameters()]
    assert 0 in sizes  # a shard without elements takes part in the update
    x = torch.ones(2, 3)
    for _ in range(3):
        outputs, norms = [], []
        for student, teacher in pairs:
            with torch.no_grad():
                outputs.append(teacher.module(x))
            student(x).square().mean().backward()
            norms.append(clip_grad_norm(student, 0.1))
            with torch.no_grad():
                for parameter in student.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad)
                        parameter.grad = None
            teacher.update(student)
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(norms[0], norms[1])
    with torch.no_grad():
        torch.testing.assert_close(pairs[0][1].module(x), pairs[1][1].module(x))
        assert (pairs[0][1].module(x) - plain(x)).abs().max() > 1e-4


@pytest.mark.dist
def test_sharded_ema_equals_the_plain_one(tmp_path):
    mp.spawn(two_rank_run, args=(str(tmp_path / "store"),), nprocs=2)
