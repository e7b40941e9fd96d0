"""Validation during training: text-only accuracy and K_gen of the student on a fixed probe set.

The probe set is a stratified sample of the validation split that depends on --data_seed alone.

    accuracy    of greedy decoding after C_S; an answer that cannot be parsed is wrong
    K_gen       Eq. 4 on the data set's own text, as "post" of Eq. 9: the frozen base under C_T with
                the real visual thoughts against the current student under C_S
    k_gen_of    the same KL per class of token (data/token_classes.py), mean over its tokens
    gap closed  1 - K_gen / K_gen of the base on both sides

The teacher of K_gen is where training began, not the EMA teacher: that one moves, and a distance to
it could shrink because the teacher has lost what it saw. Its hidden states and its text head are
kept, so each of its distributions over the whole vocabulary is at hand.

All runs on the rollout copy, each process on its share, without communication in between. What is
measured at step 0, before any update, is the untrained base.
"""

import copy
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from data.answers import answers_match, extract_answer
from data.contexts import reference_completion, student_context, teacher_context
from data.example import DataError, Example, Fields
from data.mixture import Mixture
from data.parquet import ParquetSource, RowReader, find_files, iter_examples, resolve_root
from data.processor import Processor
from data.token_classes import CLASSES, TokenClass, TokenClassifier
from modeling.generation import SamplingParams, generate
from train.checkpoint import CheckpointWriter
from train.config import OpsdConfig, UsageError
from train.folders import FRESH, Start, find_resumable
from train.kgen import Rows, TokenIds, TokenKL, completion_rows, token_kls
from train.metrics import MetricLogger, gather_from_ranks, say
from train.optim import check_finite
from train.parallel import RolloutCopy
from train.records import (
    base_record,
    checkpoint_name,
    config_hash,
    read_records,
    run_info,
    write_records,
)
from train.sentinel import Sentinel
from train.state import STATE, read_trainer

SPLIT = "validation"
FIELDS = Fields(thoughts=False)
OVERALL = "overall"
FILE = "validation.jsonl"  # in --results_dir, a record per task and one overall for each validation
Scores = dict[str, dict[str, float]]  # task or "overall" -> values


@dataclass(frozen=True)
class Probe:
    """One row of the probe set. What is kept stays on the CPU."""

    index: int  # in the whole set
    example: Example  # without its visual thoughts, which only the reference needs
    completion: TokenIds
    classes: tuple[TokenClass, ...]  # of the completion's tokens
    reference: Tensor  # (T + 1, D) hidden states of the base under C_T


@dataclass(frozen=True)
class Outcome:
    """What one row came to."""

    index: int
    task: str
    accuracy: float  # 0 or 1
    unparsed_rate: float  # 0 or 1
    budget_rate: float  # 0 or 1: the completion was cut off
    mean_tokens: float  # of the decoded completion
    k_gen: float  # nats per token
    of_class: dict[TokenClass, list[float]]  # KL_t by class of token


MEASURES = ("accuracy", "unparsed_rate", "budget_rate", "mean_tokens", "k_gen")
BY_CLASS = "k_gen_of/"  # begins the names of its means by class of token


class Validation:
    """The probe set of this process, and what was measured on it so far."""

    def __init__(
        self,
        writer: CheckpointWriter,
        actor: RolloutCopy,
        probes: Sequence[Probe],
        head: nn.Linear | None,
        probe_set: str = "",
    ) -> None:
        self.writer, self.actor, self.probes, self.head = writer, actor, probes, head
        self.config, self.world, self.processor = writer.config, writer.world, writer.processor
        self.probe_set = probe_set  # hash of the rows, of all processes
        self.scores: dict[int, Scores] = {}  # step -> what was measured, in ascending order
        self.records: list[dict[str, Any]] = []  # of rank 0
        self.best: tuple[float, float] | None = None  # accuracy, -K_gen

    def due(self, step: int) -> bool:
        """Whether the student is measured after `step` updates."""
        every = self.config.validation.validate_every
        return every > 0 and (step % every == 0 or step == self.config.optim.total_steps)

    def after(
        self,
        step: int,
        student: nn.Module,
        ema: nn.Module | None,
        metrics: MetricLogger,
        sentinel: Sentinel,
    ) -> None:
        """Measure the student if it is due after `step` updates, and keep it if it is the best.

        The best has the highest accuracy, at equal accuracy the lowest K_gen; of equal ones the
        first stays. The sentinel has a look at the scores. Collective.

        Raises:
            NonFiniteError: K_gen is NaN or infinite.
        """
        if not self.due(step) or step in self.scores:
            return
        self.actor.refresh(student)
        scores = self.measure(step)
        key = _key(scores[OVERALL])
        better = self.best is None or key > self.best
        shown = {
            name + ("" if task == OVERALL else f"/{task}"): values[name]
            for name in ("accuracy", "k_gen", "gap_closed")
            for task, values in scores.items()
        }
        shown |= {n: v for n, v in scores[OVERALL].items() if n.startswith(BY_CLASS)}
        self._say(step, scores[OVERALL], " (best so far)" if better else "")
        earlier = [self.scores[s][OVERALL] for s in sorted(self.scores) if s < step]
        shown |= sentinel.validation(step, earlier, scores[OVERALL])
        metrics.validated(step, shown)
        if better:
            self.best = key
            self.writer.save_best(step, student, ema)

    def measure(self, step: int) -> Scores:
        """Scores of what is in the rollout copy, the same on all ranks; rank 0 writes records.

        Collective.
        """
        ranks = gather_from_ranks(list(self._outcomes()))
        outcomes = sorted((o for rank in ranks for o in rank), key=lambda outcome: outcome.index)
        scores = summarise(outcomes)
        check_finite(step, **{f"k_gen/{task}": row["k_gen"] for task, row in scores.items()})
        base = self.scores.get(0, scores)
        for task, values in scores.items():
            values["gap_closed"] = _gap_closed(base[task]["k_gen"], values["k_gen"])
        self.scores[step] = scores
        if self.world.is_main:
            self.records += self._records(step, scores)
            write_records(self._file, self.records)
        return scores

    def progress(self, step: int) -> dict[str, Any]:
        """What a run that is resumed after `step` updates needs, for its state.

        It begins with the validation that is due then, so this one is left out.
        """
        before = {s: scores for s, scores in self.scores.items() if s < step}
        return {"probe_set": self.probe_set, "scores": before}

    def go_on(self, start: Start) -> None:
        """Take over what the run had measured; measure the base if that is missing. Collective.

        The rollout copy holds the base. Of the earlier results the best whose checkpoint is there
        becomes `best` again.
        """
        there = read_trainer(start.folder / STATE).get("validation", {}) if start.folder else {}
        if there.get("probe_set") == self.probe_set:
            self.scores = {int(step): scores for step, scores in there["scores"].items()}
        elif there.get("scores") and self.world.is_main:
            say("the validations of the run that is resumed were on other rows: they begin anew")
        if self.world.is_main:
            self._restore_records()
        if 0 not in self.scores:
            self._say(0, self.measure(0)[OVERALL], "")
        keys = {step: _key(scores[OVERALL]) for step, scores in self.scores.items() if step}
        if keys:
            step = max(keys, key=keys.__getitem__)  # the first of equal ones
            self.best = keys[step]
            if self.writer.holds(step):
                self.writer.mark_best(step)

    def _restore_records(self) -> None:
        """The records of `scores`: those of the file, or new ones where they are not in it."""
        found = read_records(self._file) if self._file.is_file() else []
        for step, scores in self.scores.items():
            rebuilt = self._records(step, scores)
            values = [record["values"] for record in rebuilt]
            same = [r for r in found if r["step"] == step and r["values"] in values]
            self.records += same if len(same) == len(rebuilt) else rebuilt
        write_records(self._file, self.records)

    @property
    def _file(self) -> Path:
        return Path(self.config.run.results_dir) / FILE

    @torch.no_grad()
    def _outcomes(self) -> Iterator[Outcome]:
        """Decode and score the rows of this process."""
        model, tokenizer = self.actor.model, self.processor.tokenizer
        params = SamplingParams(self.config.sampling.sample_max_new_tokens, 0.0, 0)
        decoded, kls = [], []
        for probes in _chunks(self.probes, self.config.run.global_batch // self.world.size):
            contexts = [student_context(p.example, self.processor) for p in probes]
            decoded += generate(model, contexts, tokenizer, params, workspace=self.actor.workspace)
        self.head.to(self.world.device)
        for probes in _chunks(self.probes, self.config.run.micro_batch):
            kls += self._kls(probes)
        self.head.cpu()
        for probe, rollout, kl in zip(self.probes, decoded, kls, strict=True):
            answer = extract_answer(tokenizer.decode(rollout.token_ids))
            yield Outcome(
                index=probe.index,
                task=probe.example.source,
                accuracy=float(answer is not None and answers_match(answer, probe.example.answer)),
                unparsed_rate=float(answer is None),
                budget_rate=float(rollout.ended_by == "budget"),
                mean_tokens=float(len(rollout.token_ids)),
                k_gen=sum(kl) / len(kl),
                of_class=_by_class(probe.classes, kl),
            )

    def _kls(self, probes: Sequence[Probe]) -> TokenKL:
        """KL_t of each completion."""
        device, completions = self.world.device, [p.completion for p in probes]
        contexts = [student_context(p.example, self.processor) for p in probes]
        special = self.processor.tokenizer.special
        student = completion_rows(self.actor.model, contexts, completions, special)
        hidden = torch.cat([p.reference for p in probes]).to(device)
        return token_kls(Rows(hidden, self.head), student, completions)

    def _records(self, step: int, scores: Scores) -> list[dict[str, Any]]:
        folder = Path(self.config.run.checkpoint_dir) / f"{step:07d}"
        common = {
            "kind": "validation",
            "system": checkpoint_name(folder if step else self.config.model.model_path),
            "id": "summary",
            "seed": self.config.data.data_seed,
            "step": step,
            "config_hash": config_hash(self.config),
            "info": run_info(),
        }
        setting = {"split": SPLIT, "completion": "dataset", "probe_set": self.probe_set}
        return [
            base_record(task=task, values=values | setting, **common)
            for task, values in scores.items()
        ]

    def _say(self, step: int, overall: dict[str, float], end: str) -> None:
        if self.world.is_main:
            say(
                f"validation after {step} updates: accuracy {overall['accuracy']:.1%}, K_gen "
                f"{overall['k_gen']:.4f} nats per token{end}"
            )


def open_validation(
    writer: CheckpointWriter, mixture: Mixture, student: nn.Module, actor: RolloutCopy
) -> Validation:
    """The validation of a run, or one that is never due where --validate_every is 0.

    `student` is still the base: what --resume puts into it comes later. Collective.

    Raises:
        UsageError: a source has fewer rows than are asked for.
        DataError: it has no validation split, or too few usable rows.
    """
    start, _ = find_resumable(writer.config)
    if writer.config.validation.validate_every == 0:
        if writer.world.is_main and start == FRESH:
            (Path(writer.config.run.results_dir) / FILE).unlink(missing_ok=True)  # another run's
        return Validation(writer, actor, [], None)
    actor.refresh(student)
    head = copy.deepcopy(actor.model.language_model.lm_head).cpu()
    probes, probe_set = _probes(writer, mixture, actor)
    validation = Validation(writer, actor, probes, head, probe_set)
    validation.go_on(start)
    return validation


def summarise(outcomes: Sequence[Outcome]) -> Scores:
    """Means per task, then over tasks, each task counting the same; "n" counts rows.

    Those by class of token are over its tokens in a task, then over the tasks that have any.
    """
    tasks = dict.fromkeys(outcome.task for outcome in outcomes)
    scores: Scores = {}
    for task in tasks:
        rows = [outcome for outcome in outcomes if outcome.task == task]
        scores[task] = {"n": len(rows)}
        scores[task] |= {name: fmean(getattr(row, name) for row in rows) for name in MEASURES}
        scores[task] |= _class_means(rows)
    overall = {name: fmean(scores[task][name] for task in tasks) for name in MEASURES}
    for name in (BY_CLASS + token_class for token_class in CLASSES):
        if found := [scores[task][name] for task in tasks if name in scores[task]]:
            overall[name] = fmean(found)
    return {**scores, OVERALL: {"n": len(outcomes), **overall}}


def _by_class(
    classes: Sequence[TokenClass], values: Sequence[float]
) -> dict[TokenClass, list[float]]:
    found: dict[TokenClass, list[float]] = {}
    for token_class, value in zip(classes, values, strict=True):
        found.setdefault(token_class, []).append(value)
    return found


def _class_means(rows: Sequence[Outcome]) -> dict[str, float]:
    """Means over all tokens of a class; a class without any has none."""
    pooled = {name: [v for row in rows for v in row.of_class.get(name, ())] for name in CLASSES}
    return {BY_CLASS + name: fmean(values) for name, values in pooled.items() if values}


@torch.no_grad()
def _probes(
    writer: CheckpointWriter, mixture: Mixture, actor: RolloutCopy
) -> tuple[list[Probe], str]:
    """This process's rows, every size-th of the set, with the base's hidden states under C_T; and
    a hash of the whole set.
    """
    world, processor = writer.world, writer.processor
    classes_of = TokenClassifier(processor.tokenizer)
    mine, probes, digest = [], [], hashlib.sha256()
    for index, example in enumerate(_examples(writer.config, mixture, world.is_main)):
        digest.update(f"{example.key}\n{example.question}\n{example.answer}\n".encode())
        if index % world.size == world.rank:
            mine.append((index, example))
        if len(mine) == writer.config.run.micro_batch:
            probes += _scored(mine, actor, processor, classes_of)
            mine = []
    probes += _scored(mine, actor, processor, classes_of) if mine else []
    return probes, digest.hexdigest()[:12]


def _scored(
    rows: list[tuple[int, Example]],
    actor: RolloutCopy,
    processor: Processor,
    classes_of: TokenClassifier,
) -> list[Probe]:
    completions = [tuple(reference_completion(example, processor)) for _, example in rows]
    contexts = [teacher_context(example, processor) for _, example in rows]
    special = processor.tokenizer.special
    hidden = completion_rows(actor.model, contexts, completions, special).hidden.cpu()
    parts = hidden.split([len(token_ids) + 1 for token_ids in completions])
    return [
        Probe(
            index,
            dataclasses.replace(example, visual_thoughts=()),
            token_ids,
            tuple(classes_of(token_ids)),
            part.clone(),
        )
        for (index, example), token_ids, part in zip(rows, completions, parts, strict=True)
    ]


def check_probe_set(config: OpsdConfig, mixture: Mixture) -> None:
    """Whether every source has the rows that --validation_samples asks for, by file footers.

    Raises:
        UsageError: no validation split, or too few rows.
        DataError: see `ParquetSource`.
    """
    if config.validation.validate_every == 0:
        return
    wanted, root = config.validation.validation_samples, config.data.data_root
    for name in mixture.config.dataset_names:
        try:
            find_files(resolve_root(root), name, SPLIT)
        except DataError as error:
            raise UsageError(
                f"--validate_every needs a {SPLIT} split: {error} A file of the training data can "
                f"serve: give it a name with {SPLIT!r} in the place of 'train'."
            ) from error
        rows = len(ParquetSource(root, name, SPLIT, FIELDS))
        if rows < wanted:
            raise UsageError(
                f"--validation_samples {wanted}, but {name} has {rows} {SPLIT} rows: ask for fewer"
            )


def _examples(config: OpsdConfig, mixture: Mixture, announce: bool) -> Iterator[Example]:
    """The probe set, the same rows as those of eval.kl_diagnostic with this seed and split.

    Raises:
        DataError: too many rows are unusable, or a source has too few others.
    """
    check_probe_set(config, mixture)
    wanted, names = config.validation.validation_samples, mixture.config.dataset_names
    reader = RowReader(mixture.config.max_skip_fraction)
    fields = dataclasses.replace(FIELDS, max_rounds=mixture.config.max_reference_rounds)
    found: Counter[str] = Counter()
    for example in iter_examples(
        config.data.data_root, names, reader, SPLIT, wanted, config.data.data_seed, fields
    ):
        found[example.source] += 1
        yield example
    if short := [name for name in names if found[name] < wanted]:
        raise DataError(
            f"{short[0]}: {found[short[0]]} usable {SPLIT} rows, --validation_samples {wanted} "
            f"were asked for. The last unusable row: {reader.last_error}"
        )
    if announce and reader.skipped:
        count = reader.skipped.total()
        print(f"{count} unusable {SPLIT} rows were replaced; the last one: {reader.last_error}")


def _key(values: dict[str, float]) -> tuple[float, float]:
    """What is compared: the larger is the better."""
    return values["accuracy"], -values["k_gen"]


def _gap_closed(base: float, now: float) -> float | None:
    """Eq. 9; None where there was no gap to begin with."""
    return 1 - now / base if base > 0 else None


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
