"""C11 and C12: the whole step, and the state that it keeps."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import measure, plain
from benchmarks.gates import Check, Gate, Settings, at_least, at_most
from benchmarks.models import TOKENIZER, models, prompt, ragged_budgets
from modeling.bagel import Bagel
from modeling.generation import SamplingParams
from modeling.pretrained import (
    RECOMPUTED,
    find_weights,
    is_generation_key,
    load_pretrained,
    save_pretrained,
)
from tests.tiny_model import TOKENS, random_image
from tests.training import WORLD
from train import opsd
from train.config import DistillArguments
from train.optim import build_optimizer, clip_grad_norm
from train.parallel import rollout_model, wrap
from train.rollout import Prompt, Trajectory, micro_batches, sample
from train.teacher import EMATeacher


class OurTrainer:
    """One step of `train.opsd.train`, made of the product's own functions."""

    def __init__(self, model: Bagel, distill: DistillArguments, lr: float = 1e-5) -> None:
        self.distill, self.model = distill, model.requires_grad_(True)
        self.student = wrap(model, WORLD)
        self.teacher = EMATeacher(wrap(copy.deepcopy(model), WORLD), distill.ema_decay)
        self.actor = rollout_model(model.config, self.student, WORLD)
        self.optimizer = build_optimizer(self.student.parameters(), lr)
        self.processor = SimpleNamespace(tokenizer=TOKENIZER)

    def step(self, samples: Sequence[plain.Sample]) -> tuple[float, float, list[Trajectory]]:
        """Loss, norm of the gradient, and what was sampled."""
        self.actor.refresh(self.student)
        prompts = [Prompt(i, s.student, s.teacher, s.budget) for i, s in enumerate(samples)]
        params = SamplingParams(max(s.budget for s in samples))
        trajectories = sample(self.actor.model, prompts, self.processor, params, 0, samples[0].seed)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in micro_batches(trajectories, len(samples), len(samples), []):
            scored = opsd.distillation(
                self.student, self.teacher, micro, len(samples), self.distill, TOKENS, WORLD.device
            )
            scored["loss"].backward()
            total += float(scored["loss"].detach())
        norm = clip_grad_norm(self.student, 1.0)
        self.optimizer.step()
        self.teacher.update(self.student)
        return total, float(norm), trajectories


def distillation_samples(count: int, mean: float = 48, cap: int = 96) -> list[plain.Sample]:
    """Prompts with a picture, for the teacher with two more, and ragged budgets."""
    samples = []
    for i, budget in enumerate(ragged_budgets(count, mean, cap, seed=7)):
        student = [*prompt(32, i), random_image(8, 8, i), *prompt(42, 100 + i)]
        drawn = [random_image(8, 8 - i % 3, 50 + i), random_image(6, 8, 90 + i)]
        teacher = [*student, *prompt(12, 200 + i), *drawn, *prompt(12, 300 + i)]
        samples.append(plain.Sample(student, teacher, budget, seed=11))
    return samples


def c11(settings: Settings) -> list[Gate]:
    """The whole step: sampling, both forwards, loss, backward, optimizer, average."""
    samples, distill = distillation_samples(8), DistillArguments()
    whole, und = (copy.deepcopy(model) for model in models("tiny"))
    ours = OurTrainer(und, distill)
    baseline = plain.PlainTrainer(whole.requires_grad_(True), distill.jsd)
    loss, norm, trajectories = ours.step(samples)
    completions = [t.rollout.token_ids for t in trajectories]
    plain_loss, plain_norm = baseline.step(samples, TOKENS, completions)
    short = sum(abs(len(c) - s.budget) for c, s in zip(completions, samples, strict=True))
    checks = (
        Check("lengths are the budgets", short, 0),
        Check("loss, relative", abs(loss - plain_loss) / plain_loss, 1e-4),
        Check("gradient norm, relative", abs(norm - plain_norm) / plain_norm, 1e-3),
    )
    timing = measure.paired(
        lambda: lambda: baseline.step(samples, TOKENS),
        lambda: lambda: ours.step(samples),
        settings.repeats,
    )
    return [
        at_least(
            "C11",
            "whole step, time of plain / ours, 8 samples, tiny",
            timing.ratio,
            "x",
            4,
            8,
            checks=checks,
            spread=timing.spread,
            detail={"plain_s": timing.baseline_s, "ours_s": timing.ours_s},
        )
    ]


def generation_bytes(trainer: OurTrainer) -> int:
    """Of the generation expert in trained weights, gradients, optimizer, average and copy."""
    held = [
        *trainer.student.named_parameters(),
        *trainer.teacher.module.named_parameters(),
        *trainer.actor.model.named_parameters(),
    ]
    return sum(p.numel() * p.element_size() for name, p in held if is_generation_key(name))


def state_bytes(trainer: OurTrainer) -> float:
    """Bytes per trained parameter: weight, gradient, optimizer, average."""
    parameters = list(trainer.student.parameters())
    moments = [v for s in trainer.optimizer.state.values() for v in s.values() if v.ndim]
    tensors = [
        *parameters,
        *(p.grad for p in parameters if p.grad is not None),
        *moments,
        *trainer.teacher.module.parameters(),
    ]
    return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in parameters)


def c12(settings: Settings) -> list[Gate]:
    """State per parameter, and the generation expert after training and export."""
    whole, _ = models("tiny")
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "out"
        save_pretrained(whole.state_dict(), whole.config, base, dtype=torch.float32)
        trainer = OurTrainer(load_pretrained(base), DistillArguments(), lr=1e-3)
        for _ in range(3):
            trainer.step(distillation_samples(2, mean=8, cap=16))
        state = trainer.model.state_dict()
        save_pretrained(
            state, whole.config, out, dtype=torch.float32, merge_from=find_weights(base)
        )
        before, after = (_all_weights(path) for path in (base, out))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    generation = {key for key in before if is_generation_key(key)}
    still = (before.keys() - generation - changed) - set(RECOMPUTED)
    lost = before.keys() ^ after.keys()
    checks = (
        Check("weights lost or added by export", len(lost), 0),
        # every understanding weight that took part; the image encoder's do, there are pictures
        Check("understanding weights that did not move", len(still), len(before) * 0.02),
    )
    return [
        at_most(
            "C12",
            "generation expert in weights, optimizer, average and copy",
            generation_bytes(trainer),
            "bytes",
            0,
            0,
            checks,
        ),
        at_most(
            "C12",
            "generation weights changed by 3 steps and export",
            len(generation & changed),
            f"of {len(generation)}",
            0,
            0,
            checks,
        ),
        at_most(
            "C12",
            "state per trained parameter",
            state_bytes(trainer),
            "bytes",
            20,
            20,
            detail={"weight": 4, "gradient": 4, "moments": 8, "average": 4},
        ),
    ]


def _all_weights(folder: Path) -> dict[str, Tensor]:
    files = find_weights(folder)
    return dict(files.read(files.location))
