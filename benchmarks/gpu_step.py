"""G10 to G13: the whole step of full-parameter OPSD in one process."""

import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import measure, plain
from benchmarks.full_size import (
    MACHINE,
    SCALES,
    Scale,
    Settings,
    build,
    case,
    median_seconds,
    percent,
    student_prompt,
    teacher_prompt,
    trajectory,
)
from benchmarks.gates import Check, Gate, at_least, at_most
from benchmarks.gpu_decoding import _sampling_floor
from benchmarks.gpu_scoring import Scoring
from benchmarks.models import TOKENIZER, ragged_budgets
from modeling.generation import SamplingParams
from tests.tiny_model import TOKENS
from train import cost, opsd
from train.config import DistillArguments
from train.master import MasterWeights
from train.optim import build_optimizer, clip_grad_norm
from train.parallel import World, rollout_model, wrap
from train.rollout import Prompt, Trajectory, sample
from train.teacher import EMATeacher


class WholeStep:
    """One optimizer step of full-parameter OPSD in one process, of the product's own functions.

    As `train.plan` says for a GPU of 141 GB: moments in host memory, decoder layers recomputed.
    """

    def __init__(self, scale: Scale, settings: Settings, samples: int) -> None:
        self.scale, self.count = scale, samples
        self.device, self.distill = settings.device, DistillArguments()
        self.world = World(0, 1, 1, settings.device, settings.dtype)
        model = build(scale.config, settings.device, torch.float32, whole=False)
        model.set_activation_checkpointing(True)
        average = copy.deepcopy(model)
        self.student = wrap(model, self.world)
        self.teacher = EMATeacher(wrap(average, self.world, trained=False))
        self.actor = rollout_model(scale.config, self.student, self.world)
        self.optimizer = build_optimizer(self.student.parameters(), lr=1e-5, moments="host")
        self.budgets = ragged_budgets(samples, scale.completion, scale.cap, seed=3)
        self.seconds: dict[str, float] = {}

    def _timed(self, stage: str, work: Callable[[], object]) -> object:
        result = []
        self.seconds[stage] = self.seconds.get(stage, 0.0) + measure.seconds(
            lambda: result.append(work()), self.device
        )
        return result[0]

    def sample(self) -> list[Trajectory]:
        prompts = [
            Prompt(i, student_prompt(self.scale, 1, i), teacher_prompt(self.scale, 1, 1, i), budget)
            for i, budget in enumerate(self.budgets)
        ]
        processor = SimpleNamespace(tokenizer=TOKENIZER)
        self.actor.refresh(self.student)
        params = SamplingParams(self.scale.cap, max_image_skips=0)
        actor = self.actor
        return sample(actor.model, prompts, processor, params, 0, 0, actor.workspace)

    def score(self, trajectories: list[Trajectory]) -> None:
        for one in trajectories:
            scored = opsd.distillation(
                self.student, self.teacher, [one], self.count, self.distill, TOKENS, self.device
            )
            scored["loss"].backward()

    def update(self) -> None:
        clip_grad_norm(self.student, 1.0)
        self.optimizer.step()
        if isinstance(self.student, MasterWeights):
            self.student.publish()
        self.teacher.update(self.student)

    def step(self) -> list[Trajectory]:
        self.optimizer.zero_grad(set_to_none=True)
        trajectories = self._timed("sampling", self.sample)
        self._timed("scoring", lambda: self.score(trajectories))
        self._timed("update", self.update)
        return trajectories


def step_part(settings: Settings) -> list[Gate]:
    """The whole step of full-parameter OPSD with 16 samples: time, memory, optimizer."""
    scale = SCALES[settings.scale]
    samples = 16 if settings.scale == "full" else 4
    ours = WholeStep(scale, settings, samples)
    trajectories = ours.step()  # compiles
    short = sum(
        abs(len(t.rollout.token_ids) - b) for t, b in zip(trajectories, ours.budgets, strict=True)
    )
    ours.seconds.clear()
    peak = measure.peak_of(ours.step, settings.device)
    seconds, stages = sum(ours.seconds.values()), dict(ours.seconds)
    budgets, trained = ours.budgets, sum(p.numel() for p in ours.student.parameters())
    del ours, trajectories
    gc.collect()  # hooks make cycles
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    baseline = _plain_step(scale, settings, budgets)
    floor = _step_floor(scale, budgets)
    update_floor = (cost.adamw(trained) + cost.ema(trained)).seconds(MACHINE)
    updating = _update_seconds(scale, settings, trained)
    return [
        at_least(
            "G10",
            "AdamW, weights and average from masters, share of the floor, moments on the device",
            percent(update_floor, updating),
            "%",
            70,
            85,
            detail={"seconds": updating, "seconds_from_host": stages["update"]},
        ),
        at_least(
            "G11",
            f"whole step of {samples} samples, plain / ours",
            sum(baseline.values()) / seconds,
            "x",
            6,
            9,
            checks=(Check("sampled tokens short of the budgets", short, 0.02 * sum(budgets)),),
            detail={"ours_s": stages, "plain_s": baseline, "plain_rows": scale.plain_rows},
        ),
        at_most(
            "G12",
            "seconds per sample over the floor",
            seconds / floor,
            "x",
            2.2,
            1.6,
            floor_percent=percent(floor, seconds),
            detail={"seconds_per_sample": seconds / samples},
        ),
        at_most(
            "G13", "peak memory of the step", (peak.level + peak.peak) / 2**30, "GiB", 139, 120
        ),
    ]


def _update_seconds(scale: Scale, settings: Settings, trained: int) -> float:
    """Of AdamW, the cast to the compute weights and the average, for `trained` parameters: from
    those of one decoder layer.
    """
    model = build(scale.config, settings.device, torch.float32, whole=False)
    layer = model.language_model.model.layers[0]
    del model
    masters = MasterWeights(layer, settings.dtype)
    average = EMATeacher(copy.deepcopy(layer))
    optimizer = build_optimizer(masters.parameters(), lr=1e-5)
    for parameter in masters.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def update() -> None:
        optimizer.step()
        masters.publish()
        average.update(masters.module)

    part = sum(parameter.numel() for parameter in layer.parameters())
    return median_seconds(update, settings) * trained / part


def _plain_step(scale: Scale, settings: Settings, budgets: Sequence[int]) -> dict[str, float]:
    """Seconds of the plain step, from `plain_rows` samples; AdamW and average from a slice."""
    work, some = Scoring(scale, settings), slice(0, scale.plain_rows)
    share = sum(budgets) / sum(budgets[some])
    contexts = [student_prompt(scale, 1, i) for i in range(scale.plain_rows)]
    seeds = list(range(scale.plain_rows))
    sampling = measure.seconds(
        partial(plain.generate, work.whole, contexts, TOKENS, budgets[some], 1.0, seeds, eos=-1),
        settings.device,
    )
    scoring = 0.0
    for row in (0, *range(scale.plain_rows)):  # the first one twice: a warm-up
        one = trajectory(scale, budgets[row], row=row)
        if row == 0:
            scoring = 0.0
        scoring += measure.seconds(
            lambda one=one: work.plain_student(one, work.plain_target(one)), settings.device
        )
    layer = copy.deepcopy(work.whole.language_model.model.layers[0]).float()
    average = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5)

    def update() -> None:
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        plain.update_average(average, layer, 0.995)

    part = sum(p.numel() for p in layer.parameters())
    everything = sum(p.numel() for p in work.whole.parameters())
    updating = median_seconds(update, settings) * everything / part
    scored = scoring * len(budgets) / scale.plain_rows
    return {"sampling": sampling * share, "scoring": scored, "update": updating}


def _step_floor(scale: Scale, budgets: Sequence[int]) -> float:
    total = _sampling_floor(scale, budgets, sizes=(1,))
    for budget in budgets:
        one = case(scale, budget)
        total += cost.student(scale.config, one).seconds(MACHINE)
        total += cost.teacher(scale.config, one).seconds(MACHINE)
        total += cost.loss_head(scale.config, one.rows).seconds(MACHINE)
    trained = cost.parameters(scale.config).understanding
    return total + (cost.adamw(trained) + cost.ema(trained)).seconds(MACHINE)
