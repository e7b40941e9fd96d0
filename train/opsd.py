"""Visual-OPSD training: Algorithm 1 of the paper. `python -m train.opsd --help` lists the flags.

For each optimizer step:
    the student writes completions after its own context C_S = [sys, image, question];
    the teacher scores these very tokens after C_T = C_S + [intro, visual thoughts, transition];
    the student is pulled to the teacher's next-token distributions, token by token (Eq. 7);
    the teacher follows as a moving average of the student.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.token_classes import TokenClassifier
from modeling.sequence import pack
from modeling.tokenizer import SpecialTokens
from train import losses
from train.checkpoint import CheckpointWriter, updates_in
from train.config import DistillArguments, OpsdConfig, UsageError, parse_opsd
from train.drawn_vts import DrawingTeacher
from train.folders import find_resumable
from train.gates import LaunchGates
from train.interrupts import stop_signal
from train.metrics import MetricLogger, say
from train.optim import check_finite, clip_grad_norm, lr_at, set_lr
from train.parallel import World, rollout_model, wrap
from train.rollout import (
    Trajectory,
    means_by_task,
    micro_batches,
    placeholder,
    prepare,
    sample,
    sampled_labels,
    values_by_class,
)
from train.sentinel import Sentinel
from train.session import (
    check_resumed,
    observe_draws,
    open_loader,
    open_metrics,
    open_mixture,
    open_model,
    open_optimizer,
    open_processor,
    open_sentinel,
    open_writer,
    run,
)
from train.teacher import EMATeacher, Teacher, build_teacher, squared_distance
from train.validation import open_validation


def train(config: OpsdConfig, world: World) -> Path:
    """Run all steps; returns the folder of the last checkpoint."""
    sentinel = open_sentinel(config, world)
    if sentinel.stopped:
        return finished(config, world, sentinel)
    return run_steps(config, world, sentinel)


def run_steps(config: OpsdConfig, world: World, sentinel: Sentinel) -> Path:
    """The steps that are left of a run that the sentinel has not ended."""
    distill, seed = config.distill, config.run.global_seed
    mixture = open_mixture(config)
    processor = open_processor(config, mixture)
    tokens = processor.tokenizer.special
    model = open_model(config, world)
    student = wrap(model, world)
    teacher = build_teacher(
        distill.teacher_mode,
        student,
        lambda _: wrap(open_model(config, world, announce=False), world, trained=False),
        distill.ema_decay,
    )
    actor = rollout_model(model.config, student, world)
    generated = config.visual_thoughts.vt_source == "generated"
    drawing = DrawingTeacher(config, processor, world) if generated else None
    optimizer = open_optimizer(student, config)
    ema = teacher.module if isinstance(teacher, EMATeacher) else None
    writer = open_writer(config, model.config, processor, mixture, world)
    validation = open_validation(writer, mixture, student, actor)  # the student is the base yet
    start = writer.resume(student, ema, optimizer)
    last = start.folder
    classes_of = TokenClassifier(processor.tokenizer)

    with open_metrics(config, world, start) as metrics, stop_signal(world) as stop:

        def save(done: int) -> Path:
            so_far = validation.progress(done)
            return writer.save(done, student, ema, optimizer, metrics, so_far, sentinel)

        # if it was stopped before that
        validation.after(start.step, student, ema, metrics, sentinel)
        if sentinel.stopped:
            return ended(save(start.step), writer, sentinel)
        loader = metrics.timed(open_loader(config, mixture, world, start.step))
        for step, rows in enumerate(loader, start.step):
            actor.refresh(student)
            shown = drawing.redraw(rows, teacher.module, step) if drawing else rows
            prompts = prepare(shown, processor, config.sampling, step, seed, distill.noise_vt)
            params = config.sampling.params
            trajectories = sample(
                actor.model, prompts, processor, params, step, seed, actor.workspace
            )
            count = sampled(config, world, step, len(trajectories), len(prompts), len(shown))
            idle = [placeholder(rows[0][1], processor)]
            if step == start.step and distill.launch_gates:
                gates = LaunchGates(distillation, student, teacher, config, tokens, world)
                gates.check(step, trajectories, len(rows), idle)
            loss = torch.zeros((), device=world.device)
            for micro in micro_batches(trajectories, len(rows), config.run.micro_batch, idle):
                # gradients are averaged over ranks, so each rank's share counts `size` times
                scored = distillation(student, teacher, micro, count, distill, tokens, world.device)
                (scored["loss"] * world.size).backward()
                loss += scored.pop("loss").detach()
                if micro is not idle:
                    observe_scores(metrics, scored, micro, classes_of)

            norm = clip_grad_norm(student, config.optim.max_grad_norm)
            total = world.sum(loss)
            check_finite(step, loss=total, grad_norm=float(norm))
            lr = lr_at(step, config.optim) * sentinel.lr_factor
            set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # sampling has the memory meanwhile
            teacher.update(student)

            observe_draws(metrics, rows)
            observe_rollouts(metrics, len(shown), len(prompts), trajectories)
            if drawing:
                metrics.observe(undrawn=torch.arange(len(rows)) < len(rows) - len(shown))
            metrics.observe_global(loss=total, grad_norm=float(norm))
            done = step + 1
            now = {"lr": lr}
            if metrics.reports(done):  # reads all parameters
                now["teacher_drift"] = drift(teacher, student, world)
            metrics.log(done, sentinel.line, **now)
            stopping = stop.agreed()
            if writer.due(done) or stopping or sentinel.stopped:
                last = save(done)  # first of all: validation takes its time
            if stopping or sentinel.stopped:
                break
            validation.after(done, student, ema, metrics, sentinel)
            if sentinel.stopped:
                last = save(done)  # again, if it was due: now with what ended the run
                break
    return ended(last, writer, sentinel) if sentinel.stopped else last


def ended(last: Path, writer: CheckpointWriter, sentinel: Sentinel) -> Path:
    """Say why the sentinel ended the run, and what there is of it."""
    if writer.world.is_main:
        best = writer.best()
        say(
            f"the sentinel ended the run after {updates_in(last)} of "
            f"{writer.config.optim.total_steps} updates: {sentinel.stopped}; "
            + (f"the best is {best}" if best else "nothing was validated yet, so there is no best")
        )
    return last


def finished(config: OpsdConfig, world: World, sentinel: Sentinel) -> Path:
    """The folder that a resumed run had been ended with. Collective.

    Raises:
        UsageError: these are not its settings.
    """
    check_resumed(config, open_mixture(config), world)
    start, _ = find_resumable(config)
    if world.is_main:
        say(
            f"nothing to go on with: the sentinel ended this run after {start.step} updates "
            f"({sentinel.stopped}); --sentinel warn would train on"
        )
    return start.folder


def sampled(
    config: OpsdConfig, world: World, step: int, trajectories: int, prompts: int, rows: int
) -> int:
    """Number of trajectories of the step over all ranks. Collective.

    Raises:
        UsageError: there are none.
    """
    count, fitting, drawn = map(int, world.sums(trajectories, prompts, rows))
    if count == 0:
        raise UsageError(
            f"step {step}: no record has a completion; of {config.run.global_batch} {drawn} have "
            f"visual thoughts, {fitting} fitted under --max_forward_tokens "
            f"{config.sampling.max_forward_tokens} with --min_completion "
            f"{config.sampling.min_completion}, and what they wrote stayed empty"
        )
    return count


def distillation(
    student: nn.Module,
    teacher: Teacher,
    micro: list[Trajectory],
    count: int,
    config: DistillArguments,
    tokens: SpecialTokens,
    device: torch.device,
) -> dict[str, Tensor]:
    """Score one micro batch under both contexts; "loss" is its share of the step's loss.

    The step's loss is the mean over its `count` trajectories of the mean over their loss rows.
    """
    student_batch = pack([t.student for t in micro], tokens).to(device)
    teacher_batch = pack([t.teacher for t in micro], tokens).to(device)
    labels = sampled_labels(student_batch, micro)
    with torch.no_grad():
        head = partial(_teacher_head, config=config, labels=labels)
        target = teacher.module(teacher_batch, head=head)
    rows = student_batch.loss_sample
    head = partial(
        _student_head,
        config=config,
        target=target,
        labels=labels,
        weights=row_weights(micro, rows, count),
        token_weights=row_weights(micro, rows, count, labels != losses.IGNORE_INDEX),
    )
    return student(student_batch, head=head)


def row_weights(
    micro: list[Trajectory], rows: Tensor, count: int, counted: Tensor | None = None
) -> Tensor:
    """(R,) weights of the mean over `count` trajectories of per-trajectory means (Eq. 7).

    `counted` leaves rows out of the mean, e.g. those whose token was not sampled.
    """
    if micro[0].prompt.row < 0:  # a placeholder
        return torch.zeros(len(rows), device=rows.device)
    return losses.trajectory_mean_weights(rows, count, counted, n_local=len(micro))


def _teacher_head(
    hidden: Tensor, lm_head: nn.Linear, config: DistillArguments, labels: Tensor
) -> losses.TeacherTopK | Tensor:
    if config.jsd_loss_kind == "tinker":
        return losses.chunked_logprobs(hidden, lm_head, labels, config.jsd_temperature)
    return losses.teacher_topk(hidden, lm_head, config.jsd)


def _student_head(
    hidden: Tensor,
    lm_head: nn.Linear,
    config: DistillArguments,
    target: losses.TeacherTopK | Tensor,
    labels: Tensor,
    weights: Tensor,
    token_weights: Tensor,
) -> dict[str, Tensor]:
    """Objective of the student's loss rows, and what is worth watching."""
    scored = {}
    if config.jsd_loss_kind == "tinker":
        loss = losses.chunked_policy_loss(
            hidden, lm_head, target, labels, token_weights, config.jsd_temperature
        )
    else:
        out = losses.chunked_jsd(hidden, lm_head, target, config.jsd, weights)
        loss = out.loss
        scored = {
            "jsd": out.row_jsd,
            "k_gen": out.row_kl,
            "student_entropy": out.student_entropy,
            "student_mass_outside": out.mass_outside,
            "clipped_share": out.clipped_share,
        }
    loss = config.jsd_weight * loss
    if config.ce_weight:
        ce = losses.chunked_cross_entropy(hidden, lm_head, labels, token_weights)
        loss = loss + config.ce_weight * ce
    return {"loss": loss, **scored}


def drift(teacher: Teacher, student: nn.Module, world: World) -> float:
    """Root-mean-square distance of the teacher's parameters from the student's. Collective."""
    squares, count = squared_distance(teacher.module, student)
    squares, count = world.sums(squares, count)
    return math.sqrt(squares / count)


def observe_scores(
    metrics: MetricLogger,
    scored: dict[str, Tensor],
    micro: list[Trajectory],
    classes_of: TokenClassifier,
) -> None:
    """What a micro batch was scored; the gap to the teacher by task and class of token as well."""
    for name, rows in scored.items():
        if name == "k_gen":
            metrics.observe(**means_by_task(name, rows, micro))
            metrics.observe(**values_by_class(f"{name}_of", rows, micro, classes_of))
        else:
            metrics.observe(**{name: rows})


def observe_rollouts(
    metrics: MetricLogger, rows: int, prompts: int, trajectories: list[Trajectory]
) -> None:
    """Rates of what happened to this rank's rows; `prompts` of them fitted under the cap."""
    metrics.observe(
        over_cap=torch.arange(rows) < rows - prompts,
        empty_completions=torch.arange(rows) < prompts - len(trajectories),
    )
    metrics.count_tokens(sum(len(trajectory.rollout.token_ids) for trajectory in trajectories))
    for trajectory in trajectories:
        metrics.observe(
            completion_length=len(trajectory.rollout.token_ids),
            ended_by_budget=float(trajectory.ends_open),
            image_skips=trajectory.rollout.skips,
            shrunk_images=float(trajectory.prompt.image_scale < 1.0),
        )


def main() -> None:
    run(parse_opsd(), train)


if __name__ == "__main__":
    main()
