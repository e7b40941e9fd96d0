"""Questions that one system gets wrong and another right, with pictures (the paper's App. K and L).

    python -m eval.cases results/table2 --first thinkmorph --second opsd --output_dir results/cases

Cases are never picked by hand: of each data set the first --per_task questions, in its order, that
the first system alone got wrong, and the first ones that the second alone got wrong. Of rotated or
paired questions every row counts for itself; of systems that answered several times the first run.
A question that a system failed to answer is no case; `failed` says how many a data set has of them.

A case has the problem, the question, both answers and the data set's visual thoughts. The pictures
in an answer (drawn, or shown in the place of drawn ones) were not kept, so the system is asked
again: its noise is keyed by seed and row. Where it does not write what it wrote then, the record
says so under `redraw_error` and has no picture of it.

Writes cases.json (a record per case), pictures/*.png, cases.md, and pairs.json as eval.pairs does.
Pictures of an earlier run that no case names any more are removed.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import PIL.Image

from eval.asking import ask
from eval.backends.bagel import BagelConfig
from eval.benchmarks import Dataset, benchmark_root, open_benchmark
from eval.pairs import compare_rows, records_of
from eval.pairs import report as report_pairs
from eval.predictions import PREDICTIONS, read_settings
from eval.protocol import Protocol, build
from eval.sample import Reply, Sample, System
from eval.session import pick_device, plain_parser, positive
from eval.systems import SystemConfig, fingerprint, open_system
from eval.table import Row, read_rows
from train.config import UsageError
from train.records import base_record, read_records, run_info, write_atomic, write_records
from train.session import exit_on_user_error

SIDE = 224  # pixels; smaller pictures are enlarged by whole numbers towards it
RULE = "the first {} of each kind in the order of the data set"
KINDS = ("only_second", "only_first")  # who is right; the first system's mistakes come first
PICTURE = re.compile(rf".+-({'|'.join(KINDS)})-\d+-.+-\d+\.png")  # names that `save` gives here
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A question that one of two systems got right.

    kind: of KINDS. place: from 1, among the `total` questions of its kind and data set. records:
    predictions of the first and of the second system. failed: questions of the data set that are
    left out, since a system failed to answer.
    """

    task: str
    kind: str
    place: int
    total: int
    records: tuple[Record, Record]
    failed: int

    @property
    def id(self) -> str:
        return self.records[0]["id"]

    @property
    def stem(self) -> str:
        """Begin of the names of its pictures."""
        return f"{self.task}-{self.kind}-{self.place}"


def predictions_of(row: Row, task: str) -> dict[str, Record]:
    """Question -> prediction of the first run, in the order of the data set."""
    records = read_records(row.folder / task / PREDICTIONS)
    return {record["id"]: record for record in records if record["values"]["run"] == 0}


def mine(first: Row, second: Row, task: str, per_task: int) -> tuple[list[Case], int]:
    """The cases of a data set, by the rule above, and how many questions failed."""
    theirs, failed = predictions_of(second, task), 0
    found: dict[str, list[tuple[Record, Record]]] = {kind: [] for kind in KINDS}
    for id, record in predictions_of(first, task).items():
        if id not in theirs:
            continue
        ours, other = record["values"], theirs[id]["values"]
        if "error" in (ours["finish"], other["finish"]):
            failed += 1
        elif ours["correct"] != other["correct"]:
            found["only_first" if ours["correct"] else "only_second"].append((record, theirs[id]))
    cases = [
        Case(task, kind, place, len(pairs), records, failed)
        for kind, pairs in found.items()
        for place, records in enumerate(pairs[:per_task], start=1)
    ]
    return cases, failed


# --- asking again ---------------------------------------------------------------------------------


@dataclass
class Asker:
    """Opens data sets and systems as settings.json says that they were asked."""

    args: argparse.Namespace
    systems: dict[str, System] = field(default_factory=dict)
    datasets: dict[tuple[str, str], Dataset] = field(default_factory=dict)

    def sample(self, row: Row, case: Case, record: Record) -> Sample:
        """The question as the system was asked it.

        Raises:
            UsageError: the data set is not there, or another version of it is.
        """
        if (row.name, case.task) not in self.datasets:
            self.datasets[row.name, case.task] = self._open_dataset(row, case.task)
        dataset = self.datasets[row.name, case.task]
        sample = dataset[dataset.ids.index(case.id)]
        if sample.prompt_hash != record["values"]["prompt_hash"]:
            raise UsageError(
                f"{case.task}, {case.id}: {row.name} was asked another question than "
                f"{dataset.file} has now; answer it again with eval.run"
            )
        return sample

    def _open_dataset(self, row: Row, task: str) -> Dataset:
        settings = read_settings(row.folder / task)["settings"]
        dataset = open_benchmark(
            task,
            root=benchmark_root(self.args.benchmark_root),
            data_root=self.args.data_root,
            style=_protocol(row, task, settings).prompt,
            split=settings["split"],
            limit=settings["limit"],
        )
        if dataset.file_hash != settings["file_hash"]:
            raise UsageError(
                f"{dataset.file} has the hash {dataset.file_hash}, {row.name} was asked the file "
                f"{settings['file_hash']}: name its folder by --data_root or --benchmark_root"
            )
        return dataset

    def redraw(self, row: Row, case: Case, record: Record) -> Reply | None:
        """What a system answers once more where pictures were in its answer; None of other answers.

        Raises:
            UsageError: there are other weights in its folder now.
        """
        settings = read_settings(row.folder / case.task)["settings"]
        if not record["values"]["pictures"]:
            return None
        key = json.dumps([row.name, *(settings[n] for n in ("system", "weights", "protocol"))])
        if key not in self.systems:
            self.systems[key] = self._open_system(row, case.task, settings)
        sample = self.sample(row, case, record)
        (reply,) = ask(self.systems[key], [sample], record["values"]["run"], settings["seed"])
        return reply

    def _open_system(self, row: Row, task: str, settings: Record) -> System:
        where = f"{row.folder / task}/settings.json"
        model = {name: value for name, value in settings["system"].items() if name != "kind"}
        config = SystemConfig(row.name, row.name, "bagel", build(BagelConfig, model, where))
        if fingerprint(config) != settings["weights"]:
            raise UsageError(
                f"{config.model_path} has other weights than when {row.name} was asked: answer "
                "again with eval.run, or put the weights back"
            )
        dtype = settings["dtype"].removeprefix("torch.")
        device = pick_device(self.args.device)
        return open_system(config, _protocol(row, task, settings), device, dtype)


def _protocol(row: Row, task: str, settings: Record) -> Protocol:
    where = f"{row.folder / task}/settings.json"
    return Protocol.of({"name": row.values(task)["protocol"], **settings["protocol"]}, where)


# --- records and pictures -------------------------------------------------------------------------


def enlarged(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Tiny pictures larger, each pixel a square."""
    factor = max(1, SIDE // max(picture.size))
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, PIL.Image.Resampling.NEAREST) if factor > 1 else picture


def save(folder: Path, stem: str, pictures: Sequence[PIL.Image.Image]) -> list[str]:
    """Write pictures/STEM-k.png; returns the names below `folder`."""
    names = [f"pictures/{stem}-{number}.png" for number in range(1, len(pictures) + 1)]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, pictures, strict=True):
        enlarged(picture).save(folder / name)
    return names


def remove_stale(folder: Path, records: Sequence[Record]) -> None:
    """Remove pictures of earlier runs that no record names; other files stay."""
    named = {file for record in records for file in named_pictures(record["values"])}
    for file in (folder / "pictures").glob("*.png"):
        if PICTURE.fullmatch(file.name) and f"pictures/{file.name}" not in named:
            file.unlink()


def named_pictures(values: Record) -> list[str]:
    """All pictures of a case, as names below the output folder."""
    drawn = [file for answer in values["answers"] for file in answer["pictures"]]
    return [*values["problem"], *values["visual_thoughts"], *drawn]


def values_of(case: Case, rows: Sequence[Row], asker: Asker, folder: Path) -> Record:
    """Texts, counts and names of pictures of one case; writes the pictures."""
    sample = asker.sample(rows[0], case, case.records[0])
    true = sample.example.visual_thoughts if sample.example is not None else ()
    return {
        "case": case.kind,
        "place": case.place,
        "total": case.total,
        "failed": case.failed,
        "rule": RULE.format(asker.args.per_task),
        "question": sample.text,
        "gold": sample.question.gold,
        "options": dict(sample.question.options),
        "problem": save(folder, f"{case.stem}-problem", sample.images),
        "visual_thoughts": save(folder, f"{case.stem}-true", true),
        "answers": [
            answer_of(row, case, record, asker, folder)
            for row, record in zip(rows, case.records, strict=True)
        ],
        "commands": list(dict.fromkeys(record["command"] for record in case.records)),
    }


def record_of(case: Case, rows: Sequence[Row], values: Record, info: Record) -> Record:
    """The result record of a case; commits and seed are those of the answers."""
    origin = case.records[0]
    commits = dict.fromkeys(record["commit"] for record in case.records)
    return base_record(
        kind="case",
        system=":".join(row.name for row in rows),
        task=case.task,
        id=case.id,
        values=values,
        seed=origin["seed"],
        step=origin["step"],
        config_hash=origin["config_hash"],
        info={**info, "commit": ", ".join(commits)},
    )


def answer_of(row: Row, case: Case, record: Record, asker: Asker, folder: Path) -> Record:
    """What a system answered, and the pictures in it if it still answers so."""
    stored = record["values"]
    kept = ("text", "answer", "correct", "finish", "tokens", "prompt")
    reply, pictures, error = asker.redraw(row, case, record), [], ""
    if reply is not None and reply.text != stored["text"]:
        error = f"asked again, {row.name} wrote {reply.text!r} instead"
    elif reply is not None:
        pictures = save(folder, f"{case.stem}-{row.name}", reply.pictures)
    known = {name: stored[name] for name in kept}
    return {"system": row.name, **known, "seed": record["seed"]} | {
        "pictures": pictures,
        "redraw_error": error,
    }


def markdown(
    records: Sequence[Record],
    rows: Sequence[Row],
    table: str,
    rule: str,
    failed: Mapping[str, int],
) -> str:
    """All cases on a page; texts of systems and data sets stand in fences."""
    first, second = (row.name for row in rows)
    lines = [f"# {first} against {second}", "", f"Cases are {rule}.", "", *fenced(table), ""]
    if failed:
        lines += [told_failed(failed), ""]
    for record in records:
        values = record["values"]
        right, wrong = (second, first) if values["case"] == "only_second" else (first, second)
        title = f"{record['task']}: {right} right, {wrong} wrong ({values['place']} of "
        lines += [f"## {title}{values['total']})", "", f"`{record['id']}`", ""]
        lines += [*shown("problem", values["problem"]), *fenced(values["question"]), ""]
        lines += ["Right answer:", "", *fenced(values["gold"] or "see the question"), ""]
        lines += shown("visual thought of the data set", values["visual_thoughts"])
        for answer in values["answers"]:
            verdict = "right" if answer["correct"] else "wrong"
            lines += [f"{answer['system']}, {verdict}:", "", *fenced(answer["text"]), ""]
            lines += shown(f"picture in the answer of {answer['system']}", answer["pictures"])
            if answer["redraw_error"]:
                lines += ["Error, not drawn again:", "", *fenced(answer["redraw_error"]), ""]
    info = records[0] if records else rows[0].records[rows[0].tasks[0]]
    lines += [f"Seed {info['seed']}, commit {info['commit']}, `{run_info()['command']}`.", ""]
    return "\n".join(lines)


def told_failed(failed: Mapping[str, int]) -> str:
    """One line: data set -> questions that are no cases, since a system failed to answer."""
    counts = ", ".join(f"{count} of {task}" for task, count in failed.items())
    return f"Left out, since a system failed to answer: {counts}."


def fenced(text: str) -> list[str]:
    """Text as it is, whatever signs it has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def shown(title: str, files: Sequence[str]) -> list[str]:
    """Markdown of pictures under a title."""
    if not files:
        return []
    return [" ".join(f"![{title}]({quote(file)})" for file in files), ""]


def run(args: argparse.Namespace) -> list[Record]:
    """Find the cases, ask again for pictures, write the four outputs."""
    positive(per_task=args.per_task)
    if args.first == args.second:
        raise UsageError(f"--first and --second are both {args.first}: name two systems")
    first, second = rows = read_rows([args.folder], (args.first, args.second))
    folder, info = Path(args.output_dir), run_info()
    pairs = compare_rows(first, second)
    mined = {
        task: mine(first, second, task, args.per_task) for task in first.tasks if task in pairs
    }
    failed = {task: count for task, (_, count) in mined.items() if count}
    asker, records = Asker(args), []
    for case in (case for cases, _ in mined.values() for case in cases):
        records.append(record_of(case, rows, values_of(case, rows, asker, folder), info))
    counted = records_of(first, second, pairs, info)
    write_records(folder / "pairs.json", counted)
    write_records(folder / "cases.json", records)
    table = report_pairs(counted)
    page = markdown(records, rows, table, RULE.format(args.per_task), failed)
    write_atomic(folder / "cases.md", page)
    remove_stale(folder, records)
    answers = [answer for record in records for answer in record["values"]["answers"]]
    errors = [answer["redraw_error"] for answer in answers if answer["redraw_error"]]
    print(table)
    if failed:
        print(told_failed(failed))
    if errors:
        print(f"error: {len(errors)} answers could not be drawn again; the first: {errors[0]}")
    print(f"saved {len(records)} cases: {folder}/cases.md, cases.json, pairs.json and pictures/")
    return records


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = plain_parser("eval.cases", "Questions that one system gets wrong and another right.")
    add = parser.add_argument
    add("folder", type=Path, help="output folder of eval.run")
    add("--first", required=True, help="a system of the folder")
    add("--second", required=True, help="another one")
    add("--per_task", type=int, default=2, help="cases of each kind and data set")
    add("--benchmark_root", help="folder of the benchmark files; default LMUData, ~/LMUData")
    add("--data_root", help="folder of the data sets; default VISUAL_OPSD_DATA_ROOT, datasets/")
    add("--device", default="auto", help="auto (cuda where there is a GPU), cpu, cuda or cuda:N")
    add("--output_dir", required=True, help="results are written here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
