"""C5 to C7: the loss stage."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import measure, plain
from benchmarks.gates import Check, Gate, Settings, at_least, at_most
from train import losses
from train.divergence import JSDConfig

VOCAB, WIDTH, ROWS = 152_064, 256, 512
LOSS_DTYPE = torch.bfloat16
HEAD_GRADIENT = VOCAB * WIDTH * LOSS_DTYPE.itemsize  # bytes that no implementation can avoid


class LossStage:
    """Two sets of hidden states and heads; divergence and gradients from these."""

    def __init__(self, rows: int, vocab: int = VOCAB, width: int = WIDTH, top_k: int = 256) -> None:
        stream = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream).to(LOSS_DTYPE)

        self.teacher_rows = random(rows, width)
        self.rows = self.teacher_rows + 0.3 * random(rows, width)
        self.labels = torch.randint(vocab, (rows,), generator=stream)
        with torch.device("meta"):
            heads = [nn.Linear(width, vocab, bias=False) for _ in range(2)]
        weight = random(vocab, width) * (3 * width**-0.5)
        for head in heads:
            head.weight = nn.Parameter(weight.clone())
        self.head, self.teacher_head = heads[0], heads[1].requires_grad_(False)
        self.config = JSDConfig(top_k=top_k)

    def plain(self) -> float:
        args = self.head, self.teacher_rows, self.teacher_head, self.labels, self.config
        return self._backward(lambda rows: plain.loss(rows, *args))

    def ours(self) -> float:
        weights = torch.full((len(self.rows),), 1 / len(self.rows))

        def loss(rows: Tensor) -> Tensor:
            target = losses.teacher_topk(self.teacher_rows, self.teacher_head, self.config)
            return losses.chunked_jsd(rows, self.head, target, self.config, weights).loss

        return self._backward(loss)

    def _backward(self, loss: Callable[[Tensor], Tensor]) -> float:
        self.head.weight.grad = None
        rows = self.rows.clone().requires_grad_()
        value = loss(rows)
        value.backward()
        self.gradients = rows.grad, self.head.weight.grad
        return float(value.detach())


def loss_stage(kind: str, rows: int) -> measure.Work:
    """For a process of its own: see `measure.peak_in_process`."""
    getattr(LossStage(8, vocab=300, width=32, top_k=16), kind)()  # loads kernels
    return getattr(LossStage(rows), kind)


def distance(first: Tensor, second: Tensor) -> float:
    """Norm of the difference in units of the norm, in float32."""
    return float((first.float() - second.float()).norm() / second.float().norm())


def c5(settings: Settings) -> list[Gate]:
    """Peak memory of the loss stage."""
    peaks = {
        kind: measure.peak_in_process("benchmarks.loss:loss_stage", kind=kind, rows=ROWS)
        for kind in ("plain", "ours")
    }
    above = {kind: peak.peak - HEAD_GRADIENT for kind, peak in peaks.items()}
    results = [peak.result for peak in peaks.values()]
    gap = abs(results[0] - results[1]) / results[0]
    return [
        at_least(
            "C5",
            f"loss stage, peak memory of plain / ours, {ROWS} rows",
            above["plain"] / above["ours"],
            "x",
            6,
            10,
            checks=(Check("loss, relative", gap, 1e-3),),
            detail={f"{kind}_mb": bytes_ / measure.MB for kind, bytes_ in above.items()},
        )
    ]


def c6(settings: Settings) -> list[Gate]:
    """Growth of the loss stage's memory with the number of rows."""

    peaks = {
        rows: measure.peak_in_process("benchmarks.loss:loss_stage", kind="ours", rows=rows).peak
        for rows in (512, 2048)
    }
    slope = (peaks[2048] - peaks[512]) / (2048 - 512) / measure.MB
    return [
        at_most(
            "C6",
            "loss stage, peak memory per further row",
            slope,
            "MB",
            0.05,
            0.005,
            detail={f"mb_at_{rows}": peak / measure.MB for rows, peak in peaks.items()},
        )
    ]


def c7(settings: Settings) -> list[Gate]:
    """Time of the loss stage."""
    stage = LossStage(ROWS)
    found = {}

    def timed(kind: str) -> Callable[[], measure.Work]:
        def work() -> None:
            found[kind] = getattr(stage, kind)(), stage.gradients

        return lambda: work

    timing = measure.paired(timed("plain"), timed("ours"), settings.repeats)
    (loss, grads), (ours, our_grads) = found["plain"], found["ours"]
    checks = (
        Check("loss, relative", abs(ours - loss) / loss, 1e-3),
        Check("gradient of hidden states", distance(our_grads[0], grads[0]), 2e-2),
        Check("gradient of the head", distance(our_grads[1], grads[1]), 2e-2),
    )
    # teacher, student, and the two gradients of the student over the whole vocabulary
    floor = 4 * 2 * ROWS * VOCAB * WIDTH / measure.gemm_rate((ROWS, WIDTH, 16384), LOSS_DTYPE)
    return [
        at_least(
            "C7",
            f"loss stage, time of plain / ours, {ROWS} rows",
            timing.ratio,
            "x",
            2.5,
            5,
            checks=checks,
            spread=timing.spread,
            floor_percent=100 * floor / timing.ours_s,
            detail={"plain_s": timing.baseline_s, "ours_s": timing.ours_s},
        )
    ]
