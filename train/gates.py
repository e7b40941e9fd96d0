"""Launch gates: checks on the first rows of every launch that stop a run which is not exact.

    replay parity   the packed student gives each sampled token the log-prob that the sampler noted
    zero gap        with student weights and student context on both sides there is nothing to learn

Both run the objective of a step (`distillation` of train/opsd.py) on trajectories of that step,
with its packing and its sharding, and leave no trace. The student's context on the teacher's side
is cut out of the teacher's, C_T = C_S + [intro, visual thoughts, transition], so that a prompt that
differs between the two is seen as well.

Cross-entropy is left out, it is no gap. The reverse-KL policy loss is held to zero like the
divergence: its advantage log p_T - log p_S vanishes, and with it loss and gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.bagel import Head
from modeling.sequence import PackedBatch, pack
from modeling.tokenizer import SpecialTokens
from train.config import DistillArguments, OpsdConfig
from train.losses import IGNORE_INDEX, chunked_logprobs
from train.metrics import gather_from_ranks, say
from train.optim import clip_grad_norm
from train.parallel import World
from train.records import base_record, config_hash, read_records, write_records
from train.rollout import Trajectory, micro_batches, sampled_labels
from train.teacher import SelfTeacher, Teacher

ROWS = 4  # trajectories that a rank checks
FILE = "gates.jsonl"  # in --results_dir, a record per launch


class GateError(RuntimeError):
    """What is scored is not what was sampled, or there is a gap where there must be none."""


@dataclass(frozen=True)
class Limits:
    """The largest values with which the gates hold."""

    gap: float  # loss in nats, and gradient norm
    gap_share: float  # the same as a share of a real step's; the larger limit counts
    replay_max: float  # nats between the log-probs of a token by sampler and scorer
    replay_mean: float  # nats, over the tokens of all ranks


LIMITS = {
    torch.float32: Limits(1e-6, 0.0, 1e-4, 1e-4),
    torch.bfloat16: Limits(1e-6, 1e-3, 0.15, 0.02),
}
PLAIN_KL_SHARE = 1e-5  # at beta 0 and 1


def limits_for(dtype: torch.dtype, objective: DistillArguments) -> Limits:
    """The limits of a compute dtype.

    For beta inside (0, 1) the gradient of equal sides vanishes term by term. That of a plain KL is
    the rounding of a sum: it grows with the gradient of a real step.
    """
    limits = LIMITS[dtype]
    if objective.jsd_loss_kind == "jsd" and objective.jsd_beta in (0.0, 1.0):
        limits = dataclasses.replace(limits, gap_share=max(limits.gap_share, PLAIN_KL_SHARE))
    return limits


@dataclass(frozen=True)
class Token:
    """A sampled token and its log-probs in nats, at temperature 1."""

    row: int  # of the step, over all ranks
    position: int  # among the sampled tokens of its row, closing ones included
    sampled: int
    label: int  # what the scorer takes for the sampled token
    recorded: float  # log-prob by the sampler
    student: float  # by the packed student
    teacher: float  # by the same weights, packed as the teacher's side

    @property
    def replay(self) -> float:
        return _distance(self.recorded, self.student)

    @property
    def gap(self) -> float:
        return _distance(self.student, self.teacher)

    def __str__(self) -> str:
        scored = "" if self.label == self.sampled else f" (scored as token {self.label})"
        return f"row {self.row}, position {self.position}, token {self.sampled}{scored}"


@dataclass(frozen=True)
class Findings:
    """What both gates found, over all ranks."""

    loss: float  # nats, without a gap
    grad_norm: float
    real_loss: float  # with the real teacher and its context
    real_grad_norm: float
    tokens: int
    replay_mean: float
    replay_worst: Token
    gap_worst: Token

    def failures(self, limits: Limits) -> list[str]:
        """One sentence for each gate that does not hold; NaN never does."""
        found = []
        worst = self.replay_worst
        if not (worst.replay <= limits.replay_max and self.replay_mean <= limits.replay_mean):
            found.append(
                f"replay parity: {worst} was sampled with log-prob {worst.recorded:.6g} and is "
                f"scored with {worst.student:.6g}, {worst.replay:.2g} apart (limit "
                f"{limits.replay_max:g}; mean over {self.tokens} tokens {self.replay_mean:.2g}, "
                f"limit {limits.replay_mean:g}). Likely causes: labels, turn tokens, positions or "
                "prompt of the scored completion are not those of the sampled one; dropout or "
                "noise in a forward; a rollout copy with other weights than the student"
            )
        allowed_loss = max(limits.gap, limits.gap_share * abs(self.real_loss))
        allowed_norm = max(limits.gap, limits.gap_share * self.real_grad_norm)
        worst = self.gap_worst
        if not (abs(self.loss) <= allowed_loss and self.grad_norm <= allowed_norm):
            found.append(
                f"zero gap: equal weights and contexts have a loss of {self.loss:.3g} (limit "
                f"{allowed_loss:.2g}) and a gradient norm of {self.grad_norm:.3g} (limit "
                f"{allowed_norm:.2g}); the sides differ most at {worst}, log-prob "
                f"{worst.student:.6g} as student and {worst.teacher:.6g} as teacher. Likely "
                "causes: prompt or completion differ between the two contexts; dropout or noise "
                "in a forward; an objective that does not vanish for equal sides"
            )
        return found

    def __str__(self) -> str:
        return (
            f"zero gap has loss {self.loss:.2g} (with the teacher {self.real_loss:.2g}) and "
            f"gradient norm {self.grad_norm:.2g} ({self.real_grad_norm:.2g}); replay of "
            f"{self.tokens} sampled tokens is within {self.replay_worst.replay:.1e} nats, mean "
            f"{self.replay_mean:.1e}"
        )


@dataclass(frozen=True)
class LaunchGates:
    """Both gates of a launch. `distillation` is that of train/opsd.py."""

    distillation: Callable[..., dict[str, Tensor]]
    student: nn.Module
    teacher: Teacher
    config: OpsdConfig
    tokens: SpecialTokens
    world: World

    def check(
        self, step: int, trajectories: Sequence[Trajectory], rows: int, idle: list[Trajectory]
    ) -> None:
        """Check some of the trajectories of `step`; print and record what comes out. Collective.

        The student's gradients are None afterwards, nothing else changes.

        Args:
            trajectories: what this rank sampled from its `rows` rows with the student's weights.
            idle: runs forward where a rank has too few of them.

        Raises:
            GateError: a gate does not hold; on every rank.
        """
        # several rounds first, then the longest: the more tokens, the more can differ
        chosen = sorted(trajectories, key=lambda t: (-t.rollout.skips, -len(t.rollout.token_ids)))
        chosen = chosen[:ROWS]
        problems = [text for t in chosen if (text := misaligned(t, self.tokens))]
        problems = [text for texts in gather_from_ranks(problems) for text in texts]
        values: dict[str, Any] = {}
        if not problems:
            micros = micro_batches(chosen, min(ROWS, rows), self.config.run.micro_batch, idle)
            findings = self._score(micros, len(chosen))
            problems = findings.failures(limits_for(self.world.compute_dtype, self.config.distill))
            values = dataclasses.asdict(findings)
        if self.world.is_main:
            self._record(step, {"passed": not problems, "problems": problems, **values})
        if problems:
            raise GateError(f"step {step}, launch gate: {'; '.join(problems)}")
        if self.world.is_main:
            say(f"launch gates hold: {findings}")

    def _score(self, micros: list[list[Trajectory]], chosen: int) -> Findings:
        """Two passes over the micro batches, without the gap and with the real teacher."""
        count = int(self.world.sum(chosen))
        seen: list[Token] = []

        def equal_sides(micro: list[Trajectory]) -> Tensor:
            micro = [without_gap(t) for t in micro]
            student, teacher = _Side(self.student, micro), _Side(self.student, micro)
            loss = self._loss(student, SelfTeacher(teacher), micro, count)
            seen.extend(_tokens(micro, student, teacher, self.tokens))
            return loss

        loss, norm = self._pass(micros, equal_sides)
        real_loss, real_norm = self._pass(
            micros, lambda micro: self._loss(self.student, self.teacher, micro, count)
        )
        # one list per rank; those of the worst tokens are empty where a rank has none
        ranks = gather_from_ranks((len(seen), math.fsum(t.replay for t in seen), _worst(seen)))
        tokens = sum(found for found, _, _ in ranks)
        worst = [token for _, _, tokens in ranks for token in tokens]
        return Findings(
            *(loss, norm, real_loss, real_norm, tokens),
            replay_mean=math.fsum(total for _, total, _ in ranks) / tokens,
            replay_worst=max(worst, key=lambda t: t.replay),
            gap_worst=max(worst, key=lambda t: t.gap),
        )

    def _loss(self, student: Any, teacher: Teacher, micro: list[Trajectory], count: int) -> Tensor:
        objective = dataclasses.replace(self.config.distill, jsd_weight=1.0, ce_weight=0.0)
        tokens, device = self.tokens, self.world.device
        scored = self.distillation(student, teacher, micro, count, objective, tokens, device)
        return scored["loss"]

    def _pass(
        self, micros: list[list[Trajectory]], score: Callable[[list[Trajectory]], Tensor]
    ) -> tuple[float, float]:
        """Loss and gradient norm as a step has them. The gradients are dropped. Collective."""
        total = 0.0
        for micro in micros:
            loss = score(micro)
            (loss * self.world.size).backward()
            total += float(loss.detach())
        norm = float(clip_grad_norm(self.student, math.inf))
        self.student.zero_grad(set_to_none=True)
        return self.world.sum(total), norm

    def _record(self, step: int, values: dict[str, Any]) -> None:
        """Add a record to those of the launches before this step."""
        path = Path(self.config.run.results_dir) / FILE
        earlier = read_records(path) if path.exists() else []
        record = base_record(
            kind="launch_gates",
            system=self.config.model.model_path,
            task="all",
            id=f"step {step}",
            values=_finite(values),
            seed=self.config.run.global_seed,
            step=step,
            config_hash=config_hash(self.config),
        )
        write_records(path, [*(r for r in earlier if r["step"] < step), record])


class _Side:
    """A network in one of the two roles that notes its log-probs of the sampled tokens."""

    def __init__(self, model: nn.Module, micro: list[Trajectory]) -> None:
        self.model, self.micro = model, micro

    def __call__(self, batch: PackedBatch, head: Head) -> Any:
        self.samples = batch.loss_sample
        self.labels = sampled_labels(batch, self.micro)

        def noting(hidden: Tensor, lm_head: nn.Linear) -> Any:
            with torch.no_grad():
                self.logprobs = chunked_logprobs(hidden, lm_head, self.labels)
            return head(hidden, lm_head)

        return self.model(batch, head=noting)


def without_gap(trajectory: Trajectory) -> Trajectory:
    """With as much of the teacher's context as the student has: C_S, if all is well."""
    prompt = trajectory.prompt
    cut = dataclasses.replace(prompt, teacher=prompt.teacher[: len(prompt.student)])
    return dataclasses.replace(trajectory, prompt=cut)


def sampled_ids(trajectory: Trajectory, tokens: SpecialTokens) -> list[int]:
    """Every sampled token of all rounds, closing ones included."""
    return [
        token
        for r in trajectory.rollout.rounds
        for token in (*r.token_ids, *([tokens.eos] if r.ended_by == "eos" else []))
    ]


def misaligned(trajectory: Trajectory, tokens: SpecialTokens) -> str | None:
    """Why sampled tokens and loss rows do not correspond one to one; None if they do."""
    sampled = sampled_ids(trajectory, tokens)
    sides = {"student": trajectory.student, "teacher": trajectory.teacher}
    for side, segments in sides.items():
        labels = sampled_labels(pack([segments], tokens), [trajectory])
        scored = labels[labels != IGNORE_INDEX].tolist()
        if len(scored) != len(sampled) or len(labels) != len(sampled) + trajectory.ends_open:
            agree = zip(sampled, scored, strict=False)  # up to the end of the shorter one
            position = next((i for i, pair in enumerate(agree) if pair[0] != pair[1]), None)
            position = min(len(sampled), len(scored)) if position is None else position
            return (
                f"replay parity: row {trajectory.prompt.row} has {len(sampled)} sampled tokens, of "
                f"which the {side}'s side scores {len(scored)} in {len(labels)} loss rows, other "
                f"ones from position {position} on; a turn token, a round or a label of the packed "
                "completion is missing or too many"
            )
    return None


def _tokens(
    micro: list[Trajectory], student: _Side, teacher: _Side, special: SpecialTokens
) -> list[Token]:
    """The sampled tokens of a micro batch, none of a placeholder."""
    found = []
    for index, trajectory in enumerate(micro):
        row, sampled = trajectory.prompt.row, sampled_ids(trajectory, special)
        if row < 0:
            continue
        columns = [
            values[(student.samples == index) & (student.labels != IGNORE_INDEX)].tolist()
            for values in (student.labels, student.logprobs, teacher.logprobs)
        ]
        found += [
            Token(row, position, token, label, recorded, ours, theirs)
            for position, (token, recorded, label, ours, theirs) in enumerate(
                zip(sampled, trajectory.rollout.logprobs, *columns, strict=True)
            )
        ]
    return found


def _worst(tokens: list[Token]) -> list[Token]:
    """The tokens with the largest distances; none if there are none."""
    if not tokens:
        return []
    return [max(tokens, key=lambda t: t.replay), max(tokens, key=lambda t: t.gap)]


def _distance(first: float, second: float) -> float:
    """In nats; infinite where one of them is not a number, so that it is the worst."""
    distance = abs(first - second)
    return math.inf if math.isnan(distance) else distance


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
