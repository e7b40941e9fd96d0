"""On-policy completions of the current student, and the cap on forward tokens that acts before
sampling.

Legend: a row is one record of the optimizer step, numbered over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import torch
from torch import Tensor

from data.contexts import completion, student_context, teacher_context
from data.mixture import Drawn
from data.processor import Processor
from data.streams import stream_seed
from data.token_classes import CLASSES, TokenClassifier
from modeling.bagel import Bagel
from modeling.generation import Rollout, Round, SamplingParams, Workspace, generate
from modeling.sequence import PackedBatch, Segment, segment_length
from train.config import SamplingArguments
from train.divergence import IGNORE_INDEX

SHRINK = 0.8  # factor on the sides of the visual thoughts, tried again until the row fits
SMALLEST_SCALE = 0.1
MAX_RESAMPLES = 2  # of a row whose completion came out empty


@dataclass(frozen=True)
class Prompt:
    """One record, ready to be sampled."""

    row: int  # global row of the step
    student: list[Segment]  # C_S
    teacher: list[Segment]  # C_T
    budget: int  # completion tokens
    image_scale: float = 1.0  # of the visual thoughts, below 1 when the cap asked for it
    task: str = ""  # the source of the record


@dataclass(frozen=True)
class Trajectory:
    """A prompt and what the student wrote after it."""

    prompt: Prompt
    rollout: Rollout

    @property
    def completion(self) -> list[Segment]:
        return completion([r.token_ids for r in self.rollout.rounds])

    @property
    def student(self) -> list[Segment]:
        return [*self.prompt.student, *self.completion]

    @property
    def teacher(self) -> list[Segment]:
        return [*self.prompt.teacher, *self.completion]

    @property
    def ends_open(self) -> bool:
        """The budget ended it: its last loss row predicts a closing token that was not sampled."""
        return self.rollout.ended_by == "budget"


def context_length(segments: Sequence[Segment]) -> int:
    return sum(segment_length(segment) for segment in segments)


def prepare(
    rows: Sequence[tuple[int, Drawn]],
    processor: Processor,
    sampling: SamplingArguments,
    step: int,
    seed: int,
    noise_vt: bool,
) -> list[Prompt]:
    """Contexts and budgets. Rows that cannot leave `min_completion` tokens are left out."""
    prompts = []
    for row, drawn in rows:
        noise_seed = stream_seed(seed, "noise", step, row) if noise_vt else None
        prompt = _fit(row, drawn, processor, sampling, noise_seed)
        if prompt is not None:
            prompts.append(prompt)
    return prompts


def _fit(
    row: int,
    drawn: Drawn,
    processor: Processor,
    sampling: SamplingArguments,
    noise_seed: int | None,
) -> Prompt | None:
    """Shrink the visual thoughts until the teacher's sequence leaves room for a completion.

    What the completion may grow by besides its tokens are the turn tokens of its rounds.
    """
    turns = 2 * (1 + sampling.sample_max_image_skips)
    student = student_context(drawn.example, processor)
    vt = "real" if noise_seed is None else "noise"
    scale = 1.0
    while scale >= SMALLEST_SCALE:
        teacher = teacher_context(drawn.example, processor, vt, noise_seed, scale)
        room = sampling.max_forward_tokens - context_length(teacher) - turns
        if room >= sampling.min_completion:
            budget = min(sampling.sample_max_new_tokens, room)
            return Prompt(row, student, teacher, budget, scale, drawn.example.source)
        scale *= SHRINK
    return None


def sample(
    model: Bagel,
    prompts: Sequence[Prompt],
    processor: Processor,
    params: SamplingParams,
    step: int,
    seed: int,
    workspace: Workspace | None = None,
) -> list[Trajectory]:
    """Sample all prompts as one ragged batch; row streams are keyed by (seed, step, row).

    A row that comes out empty is sampled again a few times; if it stays empty it is left out. At
    temperature 0 it is left out at once: greedy decoding would write the same again.
    """
    pending, done = list(prompts), []
    resamples = MAX_RESAMPLES if params.temperature > 0 else 0
    for attempt in range(1 + resamples):
        seeds = [stream_seed(seed, "rollout", step, p.row, attempt) for p in pending]
        budgets = [p.budget for p in pending]
        contexts = [p.student for p in pending]
        rollouts = generate(model, contexts, processor.tokenizer, params, seeds, budgets, workspace)
        pairs = list(zip(pending, rollouts, strict=True))
        done += [Trajectory(p, r) for p, r in pairs if r.token_ids]
        pending = [p for p, r in pairs if not r.token_ids]
        if not pending:
            break
    return sorted(done, key=lambda trajectory: trajectory.prompt.row)


def placeholder(drawn: Drawn, processor: Processor) -> Trajectory:
    """Something to run forward, at weight zero, where a rank has too few trajectories: the other
    ranks are waiting for it in the collectives of that forward."""
    student = student_context(drawn.example, processor)
    rollout = Rollout((Round((processor.tokenizer.special.bos,), "budget", (0.0,)),))
    return Trajectory(Prompt(-1, student, student, 1), rollout)


def micro_batches(
    trajectories: list[Trajectory], rows: int, size: int, idle: list[Trajectory]
) -> list[list[Trajectory]]:
    """The same number of micro batches on every rank, whatever could be sampled.

    Forward and backward are collectives under sharding: a rank with fewer would leave the others
    waiting. Where nothing is left, `idle` (a placeholder, weight zero) takes its place.
    """
    return [trajectories[start : start + size] or idle for start in range(0, rows, size)]


def sampled_labels(batch: PackedBatch, micro: list[Trajectory]) -> Tensor:
    """Labels of the loss rows, -100 where the closing token was not sampled but cut off."""
    cut_off = [
        end - 1 for end, t in zip(accumulate(batch.sample_rows), micro, strict=True) if t.ends_open
    ]
    labels = batch.labels.clone()
    labels[torch.tensor(cut_off, dtype=torch.long, device=labels.device)] = IGNORE_INDEX
    return labels


def means_by_task(name: str, rows: Tensor, micro: list[Trajectory]) -> dict[str, Tensor]:
    """Means per trajectory of values (R,) at its loss rows: all as `name`, and as `name/TASK`.

    Nothing is read back from the device.
    """
    sizes = [sum(len(r.token_ids) + 1 for r in t.rollout.rounds) for t in micro]
    means = [part.mean() for part in rows.split(sizes)]
    tasks = sorted({t.prompt.task for t in micro})
    by_task = {
        f"{name}/{task}": [m for m, t in zip(means, micro, strict=True) if t.prompt.task == task]
        for task in tasks
    }
    return {key: torch.stack(values) for key, values in ({name: means} | by_task).items()}


def values_by_class(
    name: str, rows: Tensor, micro: list[Trajectory], classes_of: TokenClassifier
) -> dict[str, Tensor]:
    """The values (R,) at loss rows as `name/CLASS`, by the class of the token that a row predicts.

    A completion is read as a whole, over the rounds that it may have. The closing token of a round
    has no text and so no class: its row is in none. Nothing is read back from the device.
    """
    found: dict[str, list[int]] = {token_class: [] for token_class in CLASSES}
    row = 0
    for trajectory in micro:
        classes = iter(classes_of(trajectory.rollout.token_ids))
        for part in trajectory.rollout.rounds:
            for token_class in islice(classes, len(part.token_ids)):
                found[token_class].append(row)
                row += 1
            row += 1  # the closing token
    found = {token_class: index for token_class, index in found.items() if index}
    order = torch.tensor(list(chain.from_iterable(found.values())), device=rows.device)
    parts = rows[order].split([len(index) for index in found.values()])
    return {f"{name}/{key}": part for key, part in zip(found, parts, strict=True)}
