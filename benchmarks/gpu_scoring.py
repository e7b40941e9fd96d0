"""G5 to G9, G14, G15: the loss stage, student and teacher."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import measure, plain
from benchmarks.full_size import (
    JSD,
    MACHINE,
    SCALES,
    Scale,
    Settings,
    build,
    case,
    median_seconds,
    percent,
    trajectory,
    understanding_of,
)
from benchmarks.gates import Check, Gate, at_least, at_most
from modeling.sequence import pack
from tests.tiny_model import TOKENS
from train import cost, losses
from train.rollout import Trajectory


def loss_part(settings: Settings) -> list[Gate]:
    """The loss stage: memory above the head's gradient, and time."""
    scale = SCALES[settings.scale]
    llm, device = scale.config.llm, settings.device
    torch.manual_seed(0)
    head = nn.Linear(llm.hidden_size, llm.vocab_size, bias=False, device=device).to(settings.dtype)
    hidden = torch.randn(scale.loss_rows[1], 2, llm.hidden_size, device=device).to(settings.dtype)

    def sides(rows: int) -> tuple[Tensor, Tensor]:
        head.weight.grad = None
        student, teacher = hidden[:rows].detach().clone().unbind(1)
        return student.requires_grad_(), teacher

    def ours(rows: int) -> Tensor:
        student, teacher = sides(rows)
        kept = losses.teacher_topk(teacher, head, JSD)
        weights = torch.full((rows,), 1 / rows, device=device)
        out = losses.chunked_jsd(student, head, kept, JSD, weights)
        out.loss.backward()
        return out.loss.detach()

    def baseline(rows: int) -> Tensor:
        student, teacher = sides(rows)
        labels = torch.zeros(rows, dtype=torch.long, device=device)
        loss = plain.loss(student, head, teacher, head, labels, JSD)
        loss.backward()
        return loss.detach()

    short, rows = scale.loss_rows
    found, expected = float(ours(rows)), float(baseline(rows))
    check = Check("loss, relative", abs(found - expected) / expected, 0.02)
    gradient = head.weight.numel() * head.weight.itemsize

    def peak(side: Callable[[int], Tensor], n: int) -> int:
        """Above the gradient of the head, which is not there yet when the stage begins."""
        head.weight.grad = None
        return measure.peak_of(partial(side, n), device).peak - gradient

    peaks = {(side.__name__, n): peak(side, n) for side in (ours, baseline) for n in (short, rows)}
    nothing = Check("peaks that are not above the gradient", sum(p <= 0 for p in peaks.values()), 0)
    timing = measure.paired(
        lambda: partial(baseline, rows),
        lambda: partial(ours, rows),
        settings.repeats,
        warmup=2,
        device=device,
    )
    floor = cost.loss_head(scale.config, rows).seconds(MACHINE)
    detail = {f"{side}_{n}_mb": peak / 1e6 for (side, n), peak in peaks.items()}
    return [
        at_most(
            "G5",
            f"peak of the loss stage at {rows} rows, ours / plain",
            peaks["ours", rows] / peaks["baseline", rows],
            "",
            1 / 8,
            1 / 25,
            checks=(check, nothing),
            detail=detail,
        ),
        at_most("G5", f"the same, ours, {rows} rows", peaks["ours", rows] / 1e6, "MB", 350, 100),
        at_most(
            "G6",
            f"time of the loss stage, {rows} rows",
            1e3 * timing.ours_s,
            "ms",
            10,
            4,
            floor_percent=percent(floor, timing.ours_s),
            detail={"plain_ms": 1e3 * timing.baseline_s},
        ),
        at_least("G6", "the same, plain / ours", timing.ratio, "x", 2, 4, spread=timing.spread),
    ]


class Scoring:
    """Forward and backward of student and teacher on one sample, without optimizer."""

    def __init__(self, scale: Scale, settings: Settings) -> None:
        self.scale, self.device = scale, settings.device
        self.whole = build(scale.config, settings.device, settings.dtype, whole=True)
        self.ours = understanding_of(self.whole)

    def target(self, one: Trajectory) -> losses.TeacherTopK:
        """The teacher's side; also what G9 times."""
        batch = pack([one.teacher], TOKENS).to(self.device)
        with torch.no_grad():
            return self.ours(batch, head=partial(losses.teacher_topk, config=JSD))

    def student(self, one: Trajectory, target: losses.TeacherTopK) -> float:
        """Forward and backward; gradients are dropped."""
        batch = pack([one.student], TOKENS).to(self.device)
        rows = len(batch.loss_rows)
        weights = torch.full((rows,), 1 / rows, device=self.device)
        head = partial(losses.chunked_jsd, teacher=target, config=JSD, row_weights=weights)
        loss = self.ours(batch, head=head).loss
        loss.backward()
        self.ours.zero_grad(set_to_none=True)
        return float(loss.detach())

    def plain_target(self, one: Trajectory, padded: int = 0) -> Tensor:
        batch = pack([one.teacher], TOKENS).to(self.device)
        with torch.no_grad():
            rows = plain.hidden_rows(self.whole, batch, padded)
            plain.scored(rows, self.whole.language_model.lm_head, batch.labels)
            return rows

    def plain_student(self, one: Trajectory, teacher_rows: Tensor, padded: int = 0) -> float:
        batch, head = pack([one.student], TOKENS).to(self.device), self.whole.language_model.lm_head
        rows = plain.hidden_rows(self.whole, batch, padded)
        loss = plain.loss(rows, head, teacher_rows, head, batch.labels, JSD)
        loss.backward()
        self.whole.zero_grad(set_to_none=True)
        return float(loss.detach())


def scoring_part(settings: Settings) -> list[Gate]:
    """Student forward and backward, teacher forward: against plain, growth with length and VTs."""
    scale, device = SCALES[settings.scale], settings.device
    work = Scoring(scale, settings)
    one = trajectory(scale, scale.completion)
    target, teacher_rows = work.target(one), work.plain_target(one)
    found, expected = work.student(one, target), work.plain_student(one, teacher_rows)
    check = Check("loss, relative", abs(found - expected) / expected, 0.02)
    pairs = {}
    for name, baseline, ours in (
        ("G7", partial(work.plain_student, one, teacher_rows), partial(work.student, one, target)),
        (
            "G8",
            partial(work.plain_student, one, teacher_rows, scale.padded),
            partial(work.student, one, target),
        ),
        ("G9", partial(work.plain_target, one), partial(work.target, one)),
    ):
        pairs[name] = measure.paired(
            lambda b=baseline: b, lambda o=ours: o, settings.repeats, warmup=2, device=device
        )
    middle = case(scale)
    # one projection on the vocabulary (the teacher's is not here), gradients of kept entries only
    head = cost.loss_head(scale.config, middle.rows, gradient_ids=JSD.top_k, forward_ids=0)
    useful = {
        "G7": cost.student(scale.config, middle) + head,
        "G9": cost.teacher(scale.config, middle),
    }
    gates = []
    for name, what, must, stretch in (
        ("G7", "student forward and backward, plain / ours", 1.8, 2.5),
        ("G8", f"the same, attention of the baseline padded to {scale.padded}", 2.2, 3.0),
        ("G9", "teacher forward, plain / ours", 1.5, 2.0),
    ):
        timing = pairs[name]
        gates.append(
            at_least(
                name,
                what,
                timing.ratio,
                "x",
                must,
                stretch,
                checks=(check,),
                spread=timing.spread,
                detail={"plain_ms": 1e3 * timing.baseline_s, "ours_ms": 1e3 * timing.ours_s},
            )
        )
        if name in useful:
            rate = useful[name].flops / timing.ours_s / 1e12
            least, best = {"G7": (400, 500), "G9": (450, 550)}[name]
            floor = useful[name].seconds(MACHINE)
            gates.append(
                at_least(
                    f"{name}-rate",
                    "useful TF/s of it",
                    rate,
                    "TF/s",
                    least,
                    best,
                    floor_percent=percent(floor, timing.ours_s),
                )
            )
    gates += _growth_with_length(work, settings) + _growth_with_thoughts(work, settings)
    return gates


def _growth_with_length(work: Scoring, settings: Settings) -> list[Gate]:
    times = []
    for tokens in work.scale.growth:
        one = trajectory(work.scale, tokens)
        target = work.target(one)
        times.append(median_seconds(partial(work.student, one, target), settings))
    short, long = work.scale.growth
    what = f"student time, {long} over {short} completion tokens"
    return [at_most("G14", what, times[1] / times[0], "x", 1.3, 1.25)]


def _growth_with_thoughts(work: Scoring, settings: Settings) -> list[Gate]:
    """Measured growth of the teacher's time over the counted one."""
    times, counted = [], []
    for vts in range(4):
        one = trajectory(work.scale, work.scale.completion, vts)
        times.append(median_seconds(partial(work.target, one), settings))
        counted.append(cost.teacher(work.scale.config, case(work.scale, vts=vts)).flops)
    apart = [
        abs((seconds / times[0]) / (flops / counted[0]) - 1)
        for seconds, flops in zip(times[1:], counted[1:], strict=True)
    ]
    return [
        at_most(
            "G15",
            "growth of the teacher's time with 1, 2, 3 VTs, from the counted growth",
            100 * max(apart),
            "%",
            15,
            8,
            detail={"seconds": times, "counted": [c / counted[0] for c in counted]},
        )
    ]
