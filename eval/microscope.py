"""Token microscope: what the teacher would have said at every token of a completion.

    python -m eval.microscope --model_path models/ThinkMorph-7B --output_dir results/microscope \
        --student_path checkpoints/visual-opsd-ema-beta0.5/latest --completion greedy

The teacher is the base, shown the visual thoughts of the data set (C_T); the student is the trained
checkpoint, or the base itself, shown the problem alone (C_S). Both read the same completion: the
data set's text, or what the student writes under C_S. Per token: KL_t (Eq. 4), the clipped JSD_t of
training and how many of its entries are at the clip, both entropies, the five likeliest tokens of
either side, and the class of the token. Everything but JSD_t is over the full vocabulary at
temperature 1; logits are float32.

A text of the student ends where it asks for a picture. In training it is sampled alike, but may go
on behind such a request, once by default (--sample_max_image_skips).

Writes microscope.html, one page without a server or other files, and microscope.json.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.contexts import student_context
from data.example import DataError, Example, Fields
from data.parquet import SPLITS, RowReader, iter_examples
from data.processor import Processor
from data.token_classes import classes_of
from eval.kl_scoring import Scorer
from eval.microscope_page import Header, Side, Slide, Token, page
from eval.session import announce, open_sources, origin, parser_of, pick_device, positive
from modeling.bagel import Bagel
from modeling.generation import SamplingParams, generate
from modeling.pretrained import find_weights, load_pretrained
from modeling.tokenizer import Tokenizer
from train.config import UsageError
from train.divergence import full_logprobs
from train.kgen import Rows, TokenIds, token_kls
from train.losses import JSDConfig, chunked_jsd, teacher_topk
from train.projection import CHUNK_ROWS, chunks, projection
from train.records import base_record, checkpoint_name, write_atomic, write_records
from train.session import exit_on_user_error

TOP = 5  # likeliest tokens shown per side
Source = Literal["dataset", "sample", "greedy"]
WRITERS = {
    "dataset": "the data set's texts",
    "sample": "samples of the student at temperature 1, up to its first request for a picture",
    "greedy": "greedy texts of the student, up to its first request for a picture",
}


def sides(rows: Rows, token_ids: TokenIds, tokenizer: Tokenizer) -> list[Side]:
    """What a model says at each of the T rows that predict a completion; full vocabulary."""
    hidden = rows.hidden.float()[: len(token_ids)]
    project, ids = projection(hidden, rows.head), hidden.new_tensor(token_ids, dtype=torch.long)
    found = []
    for part, said in zip(chunks(hidden, CHUNK_ROWS), ids.split(CHUNK_ROWS), strict=True):
        logp = full_logprobs(project(part), 1.0)  # (C, V)
        top = logp.topk(min(TOP, logp.shape[-1]), dim=-1)
        columns = (
            top.indices.tolist(),
            top.values.exp().tolist(),
            logp.gather(-1, said[:, None])[:, 0].exp().tolist(),
            _entropy(logp).tolist(),
        )
        for likeliest, shares, p, entropy in zip(*columns, strict=True):
            texts = [tokenizer.decode([token]) for token in likeliest]
            found.append(Side(tuple(zip(texts, likeliest, shares, strict=True)), p, entropy))
    return found


def _entropy(logp: Tensor) -> Tensor:
    """Of each row (C, V) in nats; an entry without mass adds nothing."""
    return torch.special.entr(logp.exp()).sum(-1)


def divergences(teacher: Rows, student: Rows, config: JSDConfig) -> tuple[list[float], list[int]]:
    """JSD_t as training has it, and the number of entries at the clip, per row."""
    hidden = student.hidden.float()
    with torch.no_grad():
        table = teacher_topk(teacher.hidden.float(), teacher.head, config)
        ones = hidden.new_ones(len(hidden))
        out = chunked_jsd(hidden, student.head, table, config, ones)
    count = compared_entries(config, student.head.out_features)
    return out.row_jsd.tolist(), [round(share * count) for share in out.clipped_share.tolist()]


def compared_entries(config: JSDConfig, vocab_size: int) -> int:
    """Terms that a row's JSD is a sum of; "tail" has one more for the rest."""
    kept = config.kept(vocab_size)
    return kept + (config.top_k_mode == "tail" and kept < vocab_size)


def look(
    scorer: Scorer, student: Bagel, example: Example, token_ids: TokenIds, config: JSDConfig
) -> Slide:
    """Put one completion under the microscope."""
    tokenizer = scorer.processor.tokenizer
    teacher_rows = scorer.teacher_rows("real", [example], [token_ids])
    student_rows = scorer.student_rows(student, [example], [token_ids])
    (kl,) = token_kls(teacher_rows, student_rows, [token_ids])
    jsd, clipped = divergences(teacher_rows, student_rows, config)
    entries = compared_entries(config, student_rows.head.out_features)
    count = len(token_ids)  # the row of the closing token is left out, as in K_gen
    columns = (
        [tokenizer.decode([token]) for token in token_ids],
        token_ids,
        classes_of(token_ids, tokenizer),
        kl,
        jsd[:count],
        clipped[:count],
        [entries] * count,
        sides(teacher_rows, token_ids, tokenizer),
        sides(student_rows, token_ids, tokenizer),
    )
    return Slide(example, tuple(Token(*values) for values in zip(*columns, strict=True)))


def completions(
    source: Source, scorer: Scorer, student: Bagel, examples: Sequence[Example], budget: int
) -> list[TokenIds]:
    """What is looked at; written texts are the student's own, up to a request for a picture."""
    if source != "greedy":
        return Scorer(student, scorer.processor, scorer.seed).completions(examples, source, budget)
    contexts = [student_context(example, scorer.processor) for example in examples]
    params = SamplingParams(budget, temperature=0.0, max_image_skips=0)
    rollouts = generate(student, contexts, scorer.processor.tokenizer, params)
    return [rollout.token_ids for rollout in rollouts]


def read_examples(args: argparse.Namespace) -> list[Example]:
    """The same number of rows of every task, drawn by seed.

    Raises:
        DataError: a task has fewer usable rows.
    """
    sources = open_sources(args.dataset_config_file)
    fields = Fields(
        thoughts=False,
        full_text_only_thought=args.completion == "dataset",
        max_rounds=sources.max_reference_rounds,
    )
    reader, names = RowReader(sources.max_skip_fraction), sources.dataset_names
    rows = iter_examples(
        args.data_root, names, reader, args.split, args.num_samples, args.seed, fields
    )
    examples = list(rows)
    counts = Counter(example.source for example in examples)
    for name in names:
        if counts[name] < args.num_samples:
            raise DataError(
                f"{name}: {counts[name]} usable {args.split} rows, --num_samples "
                f"{args.num_samples} asks for more; lower it"
            )
    return examples


def records_of(slides: Sequence[Slide], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A result record per sample."""
    common = origin("microscope", args)
    student = args.student_path or args.model_path
    return [
        base_record(
            task=slide.example.source,
            id=slide.example.key,
            values={
                "student": checkpoint_name(student),
                "completion": args.completion,
                "split": args.split,
                "jsd": asdict(jsd_config(args)),
                "question": slide.example.question,
                "gold": slide.example.answer,
                "mean_kl": slide.mean_kl,
                "tokens": [token_values(token) for token in slide.tokens],
            },
            **common,
        )
        for slide in slides
    ]


def token_values(token: Token) -> dict[str, Any]:
    """A token as json: of either side the likeliest tokens, p of this one, and entropy."""
    values = asdict(token)
    values["class"] = values.pop("token_class")
    for side in ("teacher", "student"):
        found = values.pop(side)
        values[side] = [[text, p] for text, _, p in found["top"]]
        values |= {f"{side}_p": found["p"], f"{side}_entropy": found["entropy"]}
    return values


def jsd_config(args: argparse.Namespace) -> JSDConfig:
    """The divergence of the flags.

    Raises:
        UsageError: values that make no sense.
    """
    try:
        return JSDConfig(
            beta=args.jsd_beta,
            top_k=args.jsd_top_k,
            top_k_mode=args.jsd_top_k_mode,
            token_clip=args.jsd_token_clip,
            clip_mode=args.jsd_clip_mode,
            temperature=args.jsd_temperature,
        )
    except ValueError as error:
        raise UsageError(f"--jsd_{error}") from error


def run(args: argparse.Namespace) -> list[Slide]:
    """Look, write both files, say where they are."""
    positive(num_samples=args.num_samples, max_new_tokens=args.max_new_tokens)
    config, examples = jsd_config(args), read_examples(args)
    if args.student_path:
        find_weights(args.student_path)  # a wrong path is told before the base is loaded
    device = pick_device(args.device)
    base = student = load_pretrained(args.model_path, args.weights, device=device)
    announce(args.model_path, args.weights, base)
    if args.student_path:
        student = load_pretrained(args.student_path, device=device)
        announce(args.student_path, "auto", student)
    sizes = [model.config.llm.vocab_size for model in (base, student)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"--student_path {args.student_path}: its vocabulary has {sizes[1]} entries, that of "
            f"the base {sizes[0]}; a student has to be trained from this base"
        )
    scorer = Scorer(base, Processor.from_pretrained(args.model_path), args.seed)
    texts = completions(args.completion, scorer, student, examples, args.max_new_tokens)
    pairs = [pair for pair in zip(examples, texts, strict=True) if pair[1]]
    if not pairs:
        raise DataError("every completion is empty: use --completion dataset")
    slides = [look(scorer, student, example, ids, config) for example, ids in pairs]
    records, folder = records_of(slides, args), Path(args.output_dir)
    write_records(folder / "microscope.json", records)
    header = Header(
        teacher=args.model_path,
        student=args.student_path or args.model_path,
        completions=f"{WRITERS[args.completion]} ({args.split})",
        clip=config.token_clip if config.clips == "entry" else None,
        divergence=f"beta {config.beta}, top {compared_entries(config, sizes[0])} entries "
        f"({config.top_k_mode}), temperature {config.temperature}, "
        f"clip {config.token_clip if config.clips == 'entry' else 'off'}",
        intro=scorer.processor.prompts.reference_intro,
        transition=scorer.processor.prompts.transition,
        origin=f"{records[0]['command']}, seed {args.seed}, commit {records[0]['commit']}",
    )
    write_atomic(folder / "microscope.html", page(slides, header))
    if silent := len(examples) - len(pairs):
        print(f"{silent} samples with an empty completion were left out")
    print(f"saved {folder}/microscope.html and microscope.json: {len(slides)} samples")
    return slides


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("eval.microscope", "What the teacher would have said, token by token.")
    add = parser.add_argument
    add("--student_path", help="trained checkpoint; default: the base on both sides")
    add("--split", choices=SPLITS, default="test")
    add("--num_samples", type=int, default=2, help="rows of each source")
    add("--completion", choices=tuple(WRITERS), default="dataset", help="what is looked at")
    add("--max_new_tokens", type=int, default=1024, help="of written completions")
    add("--seed", type=int, default=42, help="of the rows and of sampling")
    add("--jsd_beta", type=float, default=0.5, help="teacher's share of the mixture")
    add("--jsd_temperature", type=float, default=1.0, help="softmax temperature, of JSD_t alone")
    add("--jsd_top_k", type=int, default=256, help="teacher entries kept per token; 0 = all")
    add(
        "--jsd_top_k_mode",
        choices=("renorm", "tail", "none"),
        default="renorm",
        help="what happens to the rest",
    )
    add("--jsd_token_clip", type=float, default=0.05, help="limit of a term in nats; <= 0 = off")
    add("--jsd_clip_mode", choices=("entry", "off"), default="entry", help="off: no limit at all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
