"""Which tokens the visual thoughts move: KL_t by class of token (the paper's Fig. 6 and App. F).

    python -m eval.token_classes results/kl --model_path models/ThinkMorph-7B

Reads records.jsonl of the KL diagnostic; the checkpoint lends its tokenizer, no model runs. The
classes (tag, answer, number, function, content, other) are those of data/token_classes.py.

The test asks whether content words are moved further than function words: the difference of their
means per sample, its bootstrap interval over samples, and a sign-flip permutation test.

Writes tokens.json (a record per task and class, and per test) and tokens.md beside what it read.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from data.streams import stream_seed
from data.token_classes import CLASSES, TokenClassifier
from eval.kl_scoring import PRE
from eval.session import markdown_table, plain_parser
from eval.statistics import OVERALL, PERCENTILES, RESAMPLES
from modeling.tokenizer import Tokenizer, load_tokenizer
from train.config import UsageError
from train.records import base_record, read_records, run_info, write_atomic, write_records
from train.session import exit_on_user_error

FLIPS = 10_000
TEST = "content - function"  # id of the records with the test


@dataclass(frozen=True)
class Tokens:
    """KL_t of one sample by class of token."""

    task: str
    by_class: dict[str, list[float]]


@dataclass(frozen=True)
class Difference:
    """Content words minus function words, mean over samples of their means; p of the test."""

    n: int
    value: float
    low: float
    high: float
    p: float


def read_tokens(folder: Path, tokenizer: Tokenizer, measure: str) -> list[Tokens]:
    """Every sample of a diagnostic.

    Raises:
        UsageError: there is no such file or measure, or the tokenizer is another one.
    """
    file = folder / "records.jsonl"
    if not file.is_file():
        raise UsageError(f"{file} is missing: run eval.kl_diagnostic with --output_dir {folder}")
    samples, classes_of = [], TokenClassifier(tokenizer)
    for record in read_records(file):
        values = record["values"]
        if measure not in values["kl_t"]:
            known = ", ".join(values["kl_t"])
            raise UsageError(f"--measure {measure}: {file} has {known}")
        ids = values["token_ids"]
        if max(ids, default=0) >= tokenizer.vocab_size:
            raise UsageError(
                f"{file} has the token {max(ids)}, the tokenizer of --model_path "
                f"{tokenizer.vocab_size} entries: name the checkpoint that was measured"
            )
        by_class: dict[str, list[float]] = {name: [] for name in CLASSES}
        kl_t = values["kl_t"][measure][: len(ids)]  # a row for the end has no token
        for name, value in zip(classes_of(ids), kl_t, strict=True):
            by_class[name].append(value)
        samples.append(Tokens(record["task"], by_class))
    return samples


def shares(samples: Sequence[Tokens]) -> dict[str, dict[str, float | int]]:
    """Class -> number of tokens, mean KL_t, and the share of all KL that is theirs."""
    pooled = {name: [v for sample in samples for v in sample.by_class[name]] for name in CLASSES}
    total = sum(map(sum, pooled.values()))
    return {
        name: {"tokens": len(values), "mean": fmean(values), "share": sum(values) / total}
        for name, values in pooled.items()
        if values
    }


def content_against_function(samples: Sequence[Tokens], seed: int) -> Difference | None:
    """The test; None where no sample has both kinds of words."""
    pairs = [(s.by_class["content"], s.by_class["function"]) for s in samples]
    found = np.array([fmean(c) - fmean(f) for c, f in pairs if c and f])
    if not len(found):
        return None
    generator = np.random.default_rng(stream_seed(seed, "bootstrap", "tokens"))
    drawn = generator.choice(found, (RESAMPLES, len(found))).mean(1)
    signs = generator.choice((-1.0, 1.0), (FLIPS, len(found)))
    flipped = np.abs((signs * found).mean(1))
    extreme = int((flipped >= abs(found.mean()) - 1e-15).sum())
    low, high = np.percentile(drawn, PERCENTILES)
    p = (extreme + 1) / (FLIPS + 1)
    return Difference(len(found), float(found.mean()), float(low), float(high), p)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, count, test, write and print; returns task -> class -> numbers."""
    samples = read_tokens(args.folder, load_tokenizer(args.model_path), args.measure)
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    found = {t: shares([s for s in samples if s.task == t]) for t in tasks}
    found[OVERALL] = shares(samples)
    tests = {
        t: content_against_function([s for s in samples if s.task == t], args.seed) for t in tasks
    }
    tests[OVERALL] = content_against_function(samples, args.seed)
    origin = read_records(args.folder / "records.jsonl")[0]
    common = {name: origin[name] for name in ("system", "seed", "step", "config_hash")}
    info = run_info()
    values = {(task, name): row for task, rows in found.items() for name, row in rows.items()}
    values |= {(task, TEST): asdict(test) for task, test in tests.items() if test is not None}
    write_records(
        args.folder / "tokens.json",
        [
            base_record(
                kind="token_classes", task=task, id=name, values=row | {"measure": args.measure},
                info=info, **common,
            )
            for (task, name), row in values.items()
        ],
    )  # fmt: skip
    text = markdown(found, tests, args.measure, info)
    write_atomic(args.folder / "tokens.md", text)
    print(text)
    print(f"saved {args.folder}/tokens.md and tokens.json")
    return found


def markdown(
    found: dict[str, Any], tests: dict[str, Difference | None], measure: str, info: dict[str, Any]
) -> str:
    """Both tables."""
    cells = {
        task: [
            f"{rows[name]['mean']:.4f} ({rows[name]['share']:.0%})" if name in rows else "–"
            for name in CLASSES
        ]
        for task, rows in found.items()
    }
    differences = {
        task: [str(d.n), f"{d.value:+.4f}", f"{d.low:+.4f} .. {d.high:+.4f}", f"{d.p:.2g}"]
        for task, d in tests.items()
        if d is not None
    }
    lines = [
        f"Mean KL_t ({measure}) in nats by class of token, and the share of all KL in that class.",
        "",
        *markdown_table(["task", *CLASSES], cells),
        "",
    ]
    if differences:
        lines += [
            "Content words minus function words, mean over samples; bootstrap interval, sign-flip "
            "permutation test.",
            "",
            *markdown_table(["task", "samples", "difference", "95 %", "p"], differences),
            "",
        ]
    lines.append(f"`{info['command']}`, commit {info['commit']}.")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = plain_parser(
        "eval.token_classes", "Which tokens the visual thoughts move, by class, with a test."
    )
    add = parser.add_argument
    add("folder", type=Path, help="output folder of eval.kl_diagnostic")
    add("--model_path", default="models/ThinkMorph-7B", help="the base measured; its tokenizer")
    add("--measure", default=PRE, help="pre (true VTs), noise_vt, shuffled_vt, post:NAME, ...")
    add("--seed", type=int, default=0, help="of bootstrap and permutations")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
