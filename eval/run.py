"""Accuracy of a checkpoint on the tasks: batched decoding, rule-based answers, one row per task.

    python -m eval.run --model_path DIR --split test --output_dir results/accuracy

--context says what the model sees. With `interleaved` it draws visual thoughts and reads them, with
`interleaved_true` it is shown those of the data set in their place.

Writes predictions.jsonl (a record per sample) and scores.json (a record per task, then overall).
"""

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from data.answers import answers_match
from data.contexts import student_context, teacher_context
from data.example import DataError, Example, Fields
from data.mixture import MixtureConfig
from data.parquet import SPLITS, ParquetSource, RowReader, iter_examples
from data.processor import Processor
from data.streams import stream_seed
from eval.session import (
    add_drawing_flags,
    announce,
    drawing_params,
    open_sources,
    origin,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    table,
    unusable_rows,
)
from eval.statistics import OVERALL, wilson_interval
from inferencer import Completion, Interleaved, InterleaveInferencer, InterleaveParams
from modeling.generation import SamplingParams
from modeling.sequence import Segment
from train.config import DTYPES, UsageError
from train.records import base_record, write_records
from train.session import exit_on_user_error

# Context -> its visual thoughts; None is the student's, without the prompts around them as well.
CONTEXTS = {"student": None, "teacher": "real", "teacher_noise": "noise", "prompts_only": "none"}


INTERLEAVED = ("interleaved", "interleaved_true")


@dataclass(frozen=True)
class Prediction:
    """One scored sample."""

    task: str
    id: str
    gold: str
    text: str
    answer: str | None  # None: nothing could be parsed, which counts as wrong
    correct: bool
    tokens: int
    ended_by: str
    skips: int
    pictures: int  # drawn or, with interleaved_true, shown
    seconds: float  # of its batch, preprocessing included, divided by the batch


def context_of(example: Example, processor: Processor, context: str, seed: int) -> list[Segment]:
    """The context that `--context` names; noise is keyed by the example."""
    vt = CONTEXTS[context]
    if vt is None:
        return student_context(example, processor)
    noise_seed = stream_seed(seed, "noise", example.key) if vt == "noise" else None
    return teacher_context(example, processor, vt, noise_seed)


def predict_interleaved(
    inferencer: InterleaveInferencer,
    examples: Sequence[Example],
    params: InterleaveParams,
    seed: int,
    true_pictures: bool = False,
) -> list[tuple[Prediction, Interleaved]]:
    """Write, draw and score one batch."""
    seeds = [stream_seed(seed, "rollout", example.key) for example in examples]
    suffix = inferencer.processor.prompts.instruction_suffix
    given = None
    if true_pictures:  # and no picture beyond them
        given = [example.visual_thoughts for example in examples]
        params = dataclasses.replace(params, max_rounds=max(map(len, given)))
    start = time.perf_counter()
    inputs = [[example.problem_image, example.question + suffix] for example in examples]
    answers = inferencer.interleave_batch(inputs, params, seeds, given=given)
    seconds = (time.perf_counter() - start) / len(examples)
    return [
        (_interleaved(example, answer, seconds), answer)
        for example, answer in zip(examples, answers, strict=True)
    ]


def _interleaved(example: Example, answer: Interleaved, seconds: float) -> Prediction:
    return Prediction(
        task=example.source,
        id=example.key,
        gold=example.answer,
        text=answer.text,
        answer=answer.answer,
        correct=answer.answer is not None and answers_match(answer.answer, example.answer),
        tokens=sum(len(rollout.token_ids) for rollout in answer.rollouts),
        ended_by=answer.rollouts[-1].ended_by,
        skips=0,
        pictures=len(answer.pictures),
        seconds=seconds,
    )


def predict(
    inferencer: InterleaveInferencer,
    examples: Sequence[Example],
    context: str,
    params: SamplingParams,
    seed: int,
) -> list[Prediction]:
    """Decode one batch and score it."""
    seeds = [stream_seed(seed, "rollout", example.key) for example in examples]
    start = time.perf_counter()
    contexts = [context_of(example, inferencer.processor, context, seed) for example in examples]
    completions = inferencer.complete(contexts, params, seeds)
    seconds = (time.perf_counter() - start) / len(examples)
    return [
        score(example, completion, seconds)
        for example, completion in zip(examples, completions, strict=True)
    ]


def score(example: Example, completion: Completion, seconds: float) -> Prediction:
    """Compare a completion with the gold answer; an unparsed one is wrong, never guessed."""
    answer, rollout = completion.answer, completion.rollout
    return Prediction(
        task=example.source,
        id=example.key,
        gold=example.answer,
        text=completion.text,
        answer=answer,
        correct=answer is not None and answers_match(answer, example.answer),
        tokens=len(rollout.token_ids),
        ended_by=rollout.ended_by,
        skips=rollout.skips,
        pictures=0,
        seconds=seconds,
    )


def task_scores(predictions: Sequence[Prediction]) -> dict[str, float | int]:
    """What is reported of one task; accuracies and rates are shares of all its samples."""
    n = len(predictions)
    accuracy = fmean(p.correct for p in predictions)
    low, high = wilson_interval(accuracy, n)
    return {
        "n": n,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "unparsed_rate": fmean(p.answer is None for p in predictions),
        "budget_rate": fmean(p.ended_by == "budget" for p in predictions),
        "mean_tokens": fmean(p.tokens for p in predictions),
        "mean_skips": fmean(p.skips for p in predictions),
        "mean_pictures": fmean(p.pictures for p in predictions),
        "seconds_per_sample": fmean(p.seconds for p in predictions),
    }


def all_scores(predictions: Iterable[Prediction]) -> dict[str, dict[str, float | int]]:
    """Scores per task, then "overall": means over tasks, each task counting the same."""
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    scores = {task: task_scores(rows) for task, rows in by_task.items()}
    rows = list(scores.values())
    overall = {name: fmean(row[name] for row in rows) for name in rows[0]}
    overall["n"] = sum(row["n"] for row in rows)
    overall["low"], overall["high"] = wilson_interval(overall["accuracy"], overall["n"])
    return {**scores, OVERALL: overall}


class Evaluation:
    """The samples of one run: which rows, in which batches."""

    def __init__(self, args: argparse.Namespace, sources: MixtureConfig) -> None:
        self.args, self.sources = args, sources
        self.fields = Fields(
            visual_thoughts=args.context in ("teacher", "teacher_noise", "interleaved_true"),
            thoughts=False,
            full_text_only_thought=False,
            max_rounds=sources.max_reference_rounds,
        )
        self.reader = RowReader(sources.max_skip_fraction)

    def __len__(self) -> int:
        """Samples, before unusable rows are left out."""
        rows = [
            len(ParquetSource(self.args.data_root, name, self.args.split, self.fields))
            for name in self.sources.dataset_names
        ]
        return sum(min(n, self.args.limit_per_task or n) for n in rows)

    def batches(self) -> Iterator[list[Example]]:
        """Batches of one task each, so that the time per sample is that of the task.

        Raises:
            DataError: too many rows are unusable, or all of a task.
        """
        for name in self.sources.dataset_names:
            examples = iter_examples(
                self.args.data_root,
                [name],
                self.reader,
                self.args.split,
                self.args.limit_per_task,
                fields=self.fields,
            )
            found = False
            while batch := list(islice(examples, self.args.batch_size)):
                found = True
                yield batch
            if not found:
                raise DataError(f"{name}: no usable row; the last one: {self.reader.last_error}")


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, float | int]]:
    """Decode, score, write predictions.jsonl and scores.json; returns the scores."""
    positive(
        limit_per_task=args.limit_per_task,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    if args.eval_image_skips and args.context in INTERLEAVED:
        raise UsageError(f"--eval_image_skips is not for --context {args.context}: it draws")
    if args.temperature < 0 or args.eval_image_skips < 0:
        raise UsageError("--temperature and --eval_image_skips must not be negative")
    evaluation = Evaluation(args, open_sources(args.dataset_config_file))
    device = pick_device(args.device)
    dtype = pick_dtype(args.compute_dtype, device)
    total = len(evaluation)  # asks for the data before the model is loaded
    inferencer = InterleaveInferencer.from_pretrained(
        args.model_path, device, dtype, args.weights, draws=args.context in INTERLEAVED
    )
    announce(args.model_path, args.weights, inferencer.model)
    params = SamplingParams(args.max_new_tokens, args.temperature, args.eval_image_skips)
    drawing = InterleaveParams(
        args.max_new_tokens, args.temperature, args.max_rounds, drawing_params(args)
    )
    predictions: list[Prediction] = []
    with tqdm(total=total, desc=args.context, unit="sample", dynamic_ncols=True) as bar:
        for batch in evaluation.batches():
            if args.context in INTERLEAVED:
                true = args.context == "interleaved_true"
                scored = predict_interleaved(inferencer, batch, drawing, args.seed, true)
                predictions += [prediction for prediction, _ in scored]
            else:
                predictions += predict(inferencer, batch, args.context, params, args.seed)
            bar.update(len(batch))
    scores = all_scores(predictions)
    for task, row in scores.items():
        row["unusable_rows"] = unusable_rows(evaluation.reader, task)
    write_results(args, predictions, scores)
    report(args, scores, evaluation.reader.last_error)
    return scores


def write_results(
    args: argparse.Namespace, predictions: Sequence[Prediction], scores: dict[str, dict]
) -> None:
    """One record per sample and one per task; all of one run share their origin."""
    common = origin("accuracy", args)
    setting = {"context": args.context, "split": args.split, "batch_size": args.batch_size}
    samples = []
    for prediction in predictions:
        values = dataclasses.asdict(prediction)
        task, key = values.pop("task"), values.pop("id")
        values |= {"parsed": prediction.answer is not None, **setting}
        samples.append(base_record(task=task, id=key, values=values, **common))
    totals = [
        base_record(task=task, id=args.context, values=row | setting, **common)
        for task, row in scores.items()
    ]
    folder = Path(args.output_dir)
    write_records(folder / "predictions.jsonl", samples)
    write_records(folder / "scores.json", totals)


def report(args: argparse.Namespace, scores: dict[str, dict], last_error: str) -> None:
    """Print the table, and what could not be used."""
    header = ["task", "n", "accuracy", "95 %", "unparsed", "tokens", "s/sample"]
    rows = [
        [
            task,
            str(row["n"]),
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} .. {row['high']:.1%}",
            f"{row['unparsed_rate']:.1%}",
            f"{row['mean_tokens']:.1f}",
            f"{row['seconds_per_sample']:.4f}",
        ]
        for task, row in scores.items()
    ]
    print(f"{args.model_path}, {args.context} context, {args.split}, batches of {args.batch_size}")
    print(table(header, rows))
    if count := scores[OVERALL]["unusable_rows"]:
        print(f"{count} unusable rows were left out; the last one: {last_error}")
    print(f"saved {args.output_dir}/scores.json and predictions.jsonl")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("eval.run", "Accuracy of a checkpoint on the tasks.")
    add = parser.add_argument
    add("--split", choices=SPLITS, default="test")
    add("--limit_per_task", type=int, help="first rows of each source; default: all")
    add(
        "--context",
        choices=(*CONTEXTS, *INTERLEAVED),
        default="student",
        help="what the model sees",
    )
    add("--max_new_tokens", type=int, default=1024)
    add("--batch_size", type=int, default=1, help="rows decoded together")
    add("--eval_image_skips", type=int, default=0, help="rounds granted after a picture request")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--seed", type=int, default=0, help="of noise VTs and of sampling")
    add(
        "--compute_dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto = bfloat16 on cuda, float32 on cpu",
    )
    add_drawing_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        evaluate(args)


if __name__ == "__main__":
    main()
