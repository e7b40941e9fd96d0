"""Where the texts of an interleaved answer look, layer by layer: Fig. 3b of the paper.

    python -m eval.attention --model_path models/mini-base --output_dir DIR

The model writes (txt0), draws (img1) and writes on (txt1); then the whole answer is put through it
in one forward, and the attention of the generated tokens of both texts is summed by what they look
at. That is done with the picture it drew, with noise and with another row's visual thought in its
place (modes drawn, noise, shuffled); a text-only student (mode text) has txt0 alone. Rows that ask
for no picture, or leave a text empty, are counted and left out.

A share is the mean over heads, generated tokens and samples; overall is the mean of the tasks. The
SOURCES of a share sum to 1; `img0` and `img1` are sums of their latents and patches. The marks
around pictures are a source of their own, the turn marks of a text belong to it. `uniform` is what
attention spread evenly over the visible tokens would give: many tokens get much.

On the first sample of each model the recorded attention is compared with that of the kernel, and
the run stops if they differ.

Writes attention.json: a record per mode, text and layer (id drawn/txt1/03) and task. It is written
after each mode, so that what ends a later one loses nothing; another run measures all anew.

Memory: two pictures of 1024 x 1024 are 2 (4096 + 4900) tokens, T = 19,000 with the texts. At 7B, in
bfloat16, that is 29 GB of weights, 2 GB for a layer's MLP and 3 x 128 MiB for the scores, which are
made for a few query rows at a time: all heads of all pairs would be 40 GB.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.example import DataError
from data.parquet import SPLITS
from data.streams import stream_seed
from eval.backends.bagel import BagelSystem, Context, interleaved_context, picture_segments
from eval.benchmarks import first_samples
from eval.protocol import Decoding, Protocol
from eval.sample import Sample
from eval.session import (
    add_drawing_flags,
    announce,
    checkpoint_step,
    drawing_of,
    open_sources,
    origin,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    table,
)
from eval.statistics import OVERALL, StratifiedMeans
from inferencer import Interleaved, InterleaveInferencer
from modeling.attention_map import Shares, attention_shares
from modeling.generation import SamplingParams
from modeling.pretrained import find_weights
from modeling.sequence import Image, Latent, Segment, Text, pack, segment_length
from train.config import DTYPES, UsageError
from train.records import base_record, checkpoint_name, write_records
from train.session import exit_on_user_error

CONTEXTS: dict[str, Context] = {
    "drawn": "interleaved",
    "noise": "interleaved_noise",
    "shuffled": "interleaved_shuffled",
}
TEXT = "text"  # the mode of the student
SOURCES = (
    "system", "img0_vae", "img0_vit", "question", "txt0", "img1_vae", "img1_vit", "txt1", "marks",
)  # fmt: skip
TOTALS = {"img0": ("img0_vae", "img0_vit"), "img1": ("img1_vae", "img1_vit")}
TEXTS = ("txt0", "txt1")


@dataclass(frozen=True)
class Part:
    """A block of the sequence and the source that its tokens are."""

    source: str
    segment: Segment


@dataclass
class Found:
    """One mode on one task: shares of every sample, and how many samples had none to give."""

    shares: list[Shares] = field(default_factory=list)
    without: int = 0


# --- the sequence of one answer -------------------------------------------------------------------


def question_parts(context: Sequence[Segment], has_system: bool) -> list[Part]:
    """What a model was shown before it wrote: system prompt, then pictures and texts."""
    parts = []
    for number, segment in enumerate(context):
        if isinstance(segment, Text):
            source = "system" if has_system and number == 0 else "question"
        else:
            source = "img0_vae" if isinstance(segment, Latent) else "img0_vit"
        parts.append(Part(source, segment))
    return parts


def answer_parts(
    inferencer: InterleaveInferencer, context: Sequence[Segment], answer: Interleaved, seed: int
) -> list[Part]:
    """Question, text, picture, text: what was in the model's context at the end of `answer`."""
    first, last = (rollout.token_ids for rollout in answer.rollouts)
    (picture,) = answer.pictures
    latents, patches = picture_segments(inferencer, picture, seed, 1)
    return [
        *question_parts(context, bool(inferencer.processor.prompts.system)),
        Part("txt0", Text(first)),
        Part("img1_vae", latents),
        Part("img1_vit", patches),
        Part("txt1", Text(last)),
    ]


def token_sources(parts: Sequence[Part]) -> Tensor:
    """(T,) the number in SOURCES of every token, the marks around pictures apart."""
    numbers: list[int] = []
    for part in parts:
        tokens = [SOURCES.index(part.source)] * segment_length(part.segment)
        if isinstance(part.segment, (Image, Latent)):
            tokens[0] = tokens[-1] = SOURCES.index("marks")
        numbers += tokens
    return torch.tensor(numbers)


def generated_rows(parts: Sequence[Part]) -> list[Tensor]:
    """Per text of the answer the places of the tokens that the model wrote."""
    groups, start = [], 0
    for part in parts:
        end = start + segment_length(part.segment)
        if part.source in TEXTS:
            groups.append(torch.arange(start + 1, end - 1))
        start = end
    return groups


def shares_of(inferencer: InterleaveInferencer, parts: Sequence[Part], check: bool) -> Shares:
    """One forward over the sequence; groups are the texts of the answer in turn."""
    batch = pack([[part.segment for part in parts]], inferencer.processor.tokenizer.special)
    sources, groups = token_sources(parts), generated_rows(parts)
    return attention_shares(inferencer.model, batch, groups, sources, len(SOURCES), check)


# --- answers of a mode ----------------------------------------------------------------------------


def sequences(
    system: BagelSystem, samples: Sequence[Sample], seeds: Sequence[int]
) -> Iterator[list[Part] | None]:
    """The whole sequence of every sample; None for one without a text, or without its picture."""
    inferencer = system.inferencer
    if system.context == "student":
        decoding = system.protocol.decoding
        params = SamplingParams(decoding.max_new_tokens, decoding.temperature, 0)
        contexts = [system.segments(*row) for row in zip(samples, seeds, strict=True)]
        completions = inferencer.complete(contexts, params, seeds)
        for context, completion in zip(contexts, completions, strict=True):
            ids = completion.rollout.token_ids
            question = question_parts(context, bool(inferencer.processor.prompts.system))
            yield [*question, Part("txt0", Text(ids))] if ids else None
        return
    answers = system.interleave(samples, seeds)
    for sample, answer, seed in zip(samples, answers, seeds, strict=True):
        if len(answer.pictures) != 1 or not all(r.token_ids for r in answer.rollouts):
            yield None
            continue
        context = interleaved_context(inferencer, system.pieces(sample), seed)
        yield answer_parts(inferencer, context, answer, seed)


def measure(
    system: BagelSystem, tasks: Sequence[Sequence[Sample]], args: argparse.Namespace, check: bool
) -> dict[str, Found]:
    """Every sample of every task under one mode. check: the first one against the kernel."""
    found = {samples[0].benchmark: Found() for samples in tasks}
    total = sum(map(len, tasks))
    with tqdm(total=total, desc=system.name, unit="sample", dynamic_ncols=True) as bar:
        for samples in tasks:
            here = found[samples[0].benchmark]
            for start in range(0, len(samples), args.batch_size):
                batch = samples[start : start + args.batch_size]
                seeds = [stream_seed(args.seed, "rollout", s.benchmark, s.id, 0) for s in batch]
                for parts in sequences(system, batch, seeds):
                    if parts is None:
                        here.without += 1
                    else:
                        here.shares.append(shares_of(system.inferencer, parts, check))
                        check = False
                    bar.update()
    if not any(task.shares for task in found.values()):
        raise DataError(
            f"{system.name}: none of {total} answers has the texts and the picture that attention "
            "is measured between: give a checkpoint that draws, or more --max_new_tokens"
        )
    return found


# --- numbers --------------------------------------------------------------------------------------


def with_totals(shares: Sequence[float]) -> dict[str, float]:
    """One number per source, and those of both pictures."""
    values = dict(zip(SOURCES, shares, strict=True))
    return values | {name: sum(values[part] for part in of) for name, of in TOTALS.items()}


def columns(shares: Sequence[Shares], group: int) -> dict[str, list[float]]:
    """ "layer/source" -> a number per sample; the even spread is the layer `uniform`."""
    rows = []
    for sample in shares:
        layers = {f"{n:02}": layer[group] for n, layer in enumerate(sample.found)}
        layers["uniform"] = sample.uniform[group]
        rows.append(
            {
                f"{layer}/{source}": value
                for layer, numbers in layers.items()
                for source, value in with_totals(numbers.tolist()).items()
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def values_of(found: dict[str, Found], mode: str, seed: int) -> dict[tuple[str, str], dict]:
    """(id, task) -> values of a record."""
    measured = {task: here for task, here in found.items() if here.shares}
    layers, groups, _ = next(iter(measured.values())).shares[0].found.shape
    values = {}
    for group in range(groups):
        means = StratifiedMeans.of(
            {task: columns(here.shares, group) for task, here in measured.items()}, seed
        )
        for task in (*measured, OVERALL):
            counted = found.values() if task == OVERALL else [found[task]]
            counts = {
                "n": sum(len(here.shares) for here in counted),
                "without": sum(here.without for here in counted),
            }
            for layer in range(layers):
                id = f"{mode}/{TEXTS[group]}/{layer:02}"
                values[id, task] = _layer_values(means, task, f"{layer:02}") | counts
    return values


def _layer_values(means: StratifiedMeans, task: str, layer: str) -> dict[str, Any]:
    names = (*SOURCES, *TOTALS)
    intervals = {name: means.mean(task, f"{layer}/{name}") for name in TOTALS}
    return {
        **{name: means.mean(task, f"{layer}/{name}").value for name in names},
        "uniform": {name: means.mean(task, f"uniform/{name}").value for name in names},
        "low": {name: interval.low for name, interval in intervals.items()},
        "high": {name: interval.high for name, interval in intervals.items()},
    }


def summary(values: dict[tuple[str, str], dict]) -> str:
    """The overall shares in percent, a line per layer, and what an even spread would give."""
    names = ("system", "img0", "question", "txt0", "img1", "txt1", "marks")
    rows, spread = [], ""
    for (id, task), found in values.items():
        if task != OVERALL:
            continue
        text = id.rpartition("/")[0]
        if text != spread:
            cells = [f"{100 * found['uniform'][name]:.1f}" for name in names]
            rows.append([f"{text}/uniform", *cells])
            spread = text
        rows.append([id, *(f"{100 * found[name]:.1f}" for name in names)])
    return table(["share, %", *names], rows)


# --- the command ----------------------------------------------------------------------------------


def opened(path: str, weights: str, args: argparse.Namespace, draws: bool) -> InterleaveInferencer:
    device = pick_device(args.device)
    dtype = pick_dtype(args.compute_dtype, device)
    inferencer = InterleaveInferencer.from_pretrained(path, device, dtype, weights, draws)
    announce(path, weights, inferencer.model)
    return inferencer


def systems(args: argparse.Namespace) -> Iterator[tuple[BagelSystem, dict[str, Any]]]:
    """A system per mode, opened when its turn comes, with the origin of its records."""
    protocol = Protocol("attention", Decoding(args.max_new_tokens), drawing=drawing_of(args))
    common = origin("attention", args)
    drawing = opened(args.model_path, args.weights, args, draws=True)
    for mode in dict.fromkeys(args.modes):
        yield BagelSystem(mode, drawing, protocol, CONTEXTS[mode]), common
    if args.student_path:
        name, step = checkpoint_name(args.student_path), checkpoint_step(args.student_path)
        student = opened(args.student_path, "auto", args, draws=False)
        system = BagelSystem(TEXT, student, protocol, "student")
        yield system, common | {"system": name, "step": step}


def read_tasks(args: argparse.Namespace) -> list[list[Sample]]:
    """The first rows of every task.

    Raises:
        UsageError: rows without visual thoughts, which cannot be shuffled.
        DataError: a row beside which no other has any.
    """
    names = args.tasks or open_sources(args.dataset_config_file).dataset_names
    tasks = [
        first_samples(name, args.data_root, args.split, args.limit_per_task)
        for name in dict.fromkeys(names)
    ]
    if "shuffled" in args.modes:
        for samples in tasks:
            check_others(samples)
    return tasks


def check_others(samples: Sequence[Sample]) -> None:
    """Raise what `read_tasks` says for a task that cannot be shuffled, before a model is loaded.

    Where two of the rows have visual thoughts, every row has another one that does.
    """
    if any(sample.example is None or sample.other is None for sample in samples):
        raise UsageError(
            f"--modes shuffled: {samples[0].benchmark} has no visual thoughts that could stand "
            "in for others; give --modes drawn noise"
        )
    if sum(bool(sample.example.visual_thoughts) for sample in samples) < 2:
        for sample in samples:
            sample.other()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError, or CheckpointError for a student that is not there."""
    positive(
        limit_per_task=args.limit_per_task,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    if args.max_rounds != 1:
        raise UsageError(
            f"--max_rounds {args.max_rounds}: attention is measured around one picture; leave it 1"
        )
    if args.student_path:
        find_weights(args.student_path, "auto")


def run(args: argparse.Namespace) -> dict[tuple[str, str], dict]:
    """Measure, write attention.json after each mode, print the table; (id, task) -> values."""
    check_arguments(args)
    tasks = read_tasks(args)
    values, records, checked = {}, [], None
    file = Path(args.output_dir) / "attention.json"
    for system, fields in systems(args):
        check, checked = system.inferencer is not checked, system.inferencer
        found = values_of(measure(system, tasks, args, check), system.name, args.seed)
        values |= found
        records += [
            base_record(task=task, id=id, values=value, **fields)
            for (id, task), value in found.items()
        ]
        write_records(file, records)
    print(summary(values))
    print(f"saved {file}")
    return values


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("eval.attention", "Where the texts of an interleaved answer look.")
    add = parser.add_argument
    add("--student_path", help="checkpoint of a distilled student, measured in text alone")
    add("--modes", nargs="+", choices=CONTEXTS, default=list(CONTEXTS), help="pictures shown")
    add("--tasks", nargs="+", help="benchmarks, as in eval.run; default: sources of the mixture")
    add("--split", choices=SPLITS, default="test", help="of data sets in the training schema")
    add("--limit_per_task", type=int, default=100, help="first rows of each task")
    add("--max_new_tokens", type=int, default=1024, help="of each text")
    add("--batch_size", type=int, default=1, help="rows that are answered together")
    add("--seed", type=int, default=0, help="of drawings, noise and bootstrap")
    add("--compute_dtype", choices=("auto", *DTYPES), default="auto", help="as in eval.run")
    add_drawing_flags(parser)
    parser.set_defaults(max_rounds=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
