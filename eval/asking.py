"""What is asked of a system on a data set, and which process asks it."""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.streams import stream_seed
from eval.backends.bagel import QUESTION_ALONE
from eval.benchmarks import PAPER, Dataset
from eval.predictions import Key, PredictionStore, check_settings
from eval.sample import Reply, Sample, System
from eval.session import checkpoint_step, pick_device, pick_dtype
from eval.systems import SystemConfig, fingerprint, is_sampled, open_system
from train.config import UsageError
from train.records import base_record, config_hash, run_info


@dataclass(frozen=True)
class Place:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> "Place":
        """What torchrun says. Some clusters set RANK alone, to that of the node: that is none."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if any(name not in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    def device(self, name: str) -> torch.device:
        """The device that a flag names, for this process: its own GPU where it says no number.

        Raises:
            UsageError: there is no such device.
        """
        device = pick_device(name)
        if device.type == "cuda" and device.index is None:
            return pick_device(f"cuda:{self.local}")
        return device


class Task:
    """One system on one data set: which answers are wanted, which are there."""

    def __init__(
        self, config: SystemConfig, dataset: Dataset, args: argparse.Namespace, place: Place
    ) -> None:
        self.config, self.dataset, self.args, self.place = config, dataset, args, place
        self.runs = args.runs if is_sampled(config, args.protocol) else 1
        self.settings = settings(config, dataset, args, self.runs, place.device(args.device))
        self.folder = Path(args.output_dir) / config.name / dataset.name
        self.done: set[Key] = set()

    def check(self) -> None:
        """Raise UsageError for what could not be asked, or not be put into the folder."""
        check_asked(self.config, self.dataset)
        check_settings(self.folder, self.settings)

    def open(self) -> None:
        """Open the folder and see what has been answered."""
        about = {
            "title": self.config.title,
            "note": self.config.note,
            "unusable_rows": self.dataset.left_out,
        }
        self.store = PredictionStore(self.folder, self.settings, self.place.rank, about)
        self.done = self.store.done()

    @property
    def keys(self) -> list[Key]:
        """Every wanted answer, in the order of the data set."""
        return [(sample, run) for run in range(self.runs) for sample in self.dataset.ids]

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """(run, places in the data set) of what this process has still to answer.

        Batches of a model do not depend on what is done: after a kill the same rows are decoded
        together again. An API answers each row for itself and for money, so it gets the rest only.
        """
        mine = range(self.place.rank, len(self.dataset), self.place.world)
        size, api = self.args.batch_size, self.config.kind == "api"
        if api:  # several requests at a time, whatever the protocol batches
            size = max(size, self.config.model.concurrency)
        for run in range(self.runs):
            missing = [n for n in mine if (self.dataset.ids[n], run) not in self.done]
            places = missing if api else list(mine)
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                if not set(batch).isdisjoint(missing):
                    yield run, batch

    def records(
        self, samples: Sequence[Sample], replies: Sequence[Reply], run: int, info: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Records of those answers of a batch that are not there yet."""
        return [
            base_record(
                kind="prediction",
                system=self.config.name,
                task=self.dataset.name,
                id=sample.id,
                values=prediction(sample, reply)
                | {
                    "run": run,
                    "batch_size": len(samples),
                    "file_hash": self.dataset.file_hash,
                    "label_version": self.dataset.label_version,
                    "protocol": self.args.protocol.name,
                    "protocol_hash": self.args.protocol.answers_hash,
                },
                seed=self.args.seed,
                step=self.settings["step"],
                config_hash=config_hash(self.settings),
                info=info,
            )
            for sample, reply in zip(samples, replies, strict=True)
            if (sample.id, run) not in self.done
        ]


def settings(
    config: SystemConfig,
    dataset: Dataset,
    args: argparse.Namespace,
    runs: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that decides the answers of one system on one data set."""
    decides = dataclasses.asdict(args.protocol)
    for name in ("name", "judge", "batch_size"):
        del decides[name]
    model = dataclasses.asdict(config.model)
    path, api = Path(config.model_path), config.kind == "api"
    for name in ("api_key_env", "concurrency", "timeout", "retries", "budget") if api else ():
        del model[name]
    local = not api and path.is_dir()
    if local:  # `latest` may point elsewhere tomorrow
        model["model_path"] = os.path.relpath(path.resolve())
    return {
        "system": {"kind": config.kind, **model},
        "weights": fingerprint(config),
        "dtype": None if api else str(pick_dtype(args.compute_dtype, device)),
        "step": checkpoint_step(path) if local else None,
        "protocol": decides,
        "benchmark": dataset.name,
        "file_hash": dataset.file_hash,
        "split": args.split,
        "limit": args.limit,
        "seed": args.seed,
        "runs": runs,
    }


def prediction(sample: Sample, reply: Reply) -> dict[str, Any]:
    """What is kept of an answer: enough to score it again without data and model."""
    question = sample.question
    return {
        "text": reply.text,
        "finish": reply.finish,
        "error": reply.error,
        "tokens": reply.tokens,
        "skips": reply.skips,
        "pictures": len(reply.pictures),
        "seconds": reply.seconds,
        "prompt": sample.text,
        "prompt_hash": sample.prompt_hash,
        "rule": question.rule,
        "gold": question.gold,
        "options": dict(question.options),
        "maze": list(question.maze),
        "group": sample.group,
        "category": sample.category,
        "source": sample.source,
        "flaw": sample.flaw,
    }


def answer_all(tasks: Sequence[Task], place: Place) -> None:
    """Ask one system everything that this process has still to ask; open it only if need be."""
    work = [(task, run, batch) for task in tasks for run, batch in task.batches()]
    if not work:
        return
    first, args = tasks[0], tasks[0].args
    device = place.device(args.device)
    system = open_system(first.config, args.protocol, device, args.compute_dtype)
    info, warm = run_info(), first.config.kind == "api"  # a request costs money
    total, name = sum(len(batch) for _, _, batch in work), first.config.name
    silent = place.rank > 0
    with tqdm(total=total, desc=name, unit="answer", dynamic_ncols=True, disable=silent) as bar:
        for task, run, batch in work:
            samples = [task.dataset[number] for number in batch]
            if not warm:
                ask(system, samples, run, args.seed)
                warm = True
            replies = ask(system, samples, run, args.seed)
            task.store.append(task.records(samples, replies, run, info))
            bar.update(len(batch))


def ask(system: System, samples: Sequence[Sample], run: int, seed: int) -> list[Reply]:
    """One batch; the random streams of a sample are keyed by itself and the run."""
    seeds = [stream_seed(seed, "rollout", s.benchmark, s.id, run) for s in samples]
    return system.answer(samples, seeds)


def check_asked(config: SystemConfig, dataset: Dataset) -> None:
    """Raise UsageError for a context that shows visual thoughts on a benchmark without any."""
    if config.kind != "bagel" or dataset.name not in PAPER:
        return
    if config.model.context not in QUESTION_ALONE:
        raise UsageError(
            f"{config.name}: context {config.model.context} is made of the visual thoughts of a "
            f"data set, and {dataset.name} has none: ask it on data sets of the training schema, "
            "such as mini"
        )
