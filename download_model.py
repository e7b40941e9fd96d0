"""Fetch the base models and the data sets, and verify what arrived.

    python download_model.py ThinkMorph-7B        # into models/ThinkMorph-7B
    python download_model.py all-data             # the four data sets, into datasets/
    python download_model.py --verify-only models/ThinkMorph-7B

Verifying needs no network. It reads headers, footers and configuration files, not the tensors, so
it takes seconds at any size: it finds files that are missing or cut off, weights that the model of
the configuration files does not have, and columns that training needs. It finds no flipped bits.
"""

import argparse
import errno
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.example import DataError, Fields
from data.parquet import ParquetSource, find_files, resolve_root
from modeling.autoencoder import AutoEncoder
from modeling.bagel import Bagel
from modeling.config import BagelConfig, ConfigError, VAEConfig
from modeling.pretrained import LATENT_HEADS, RECOMPUTED, is_generation_key
from modeling.tokenizer import TokenizerError, load_tokenizer

MODELS = {
    "ThinkMorph-7B": "ThinkMorph/ThinkMorph-7B",
    "BAGEL-7B-MoT": "ByteDance-Seed/BAGEL-7B-MoT",
}
TRAIN_ROWS = {
    "Visual_Search": 6990,
    "Spatial_Navigation": 6000,
    "Jigsaw_Assembly": 6000,
    "Chart_Refocus": 6000,
}
DATA_SETS = {name: f"ThinkMorph/{name}" for name in TRAIN_ROWS}
ALL_DATA = "all-data"
PATTERNS = {
    "model": ("*.json", "*.safetensors", "*.txt", "*.md"),  # merges.txt belongs to the tokenizer
    "dataset": ("data/*.parquet", "*.md"),
}

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
LFS_POINTER = b"version https://git-lfs"
NAMED = 4  # how many of a long list are named
OPSD_FIELDS = Fields(thoughts=False, full_text_only_thought=False)
GPUS = 8  # of the table of memory

Shapes = dict[str, tuple[int, ...]]


class DownloadError(Exception):
    """What the user can mend, in one line with the remedy."""


# ---- what to fetch, and fetching it ------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One repository of the hub and the folder for it."""

    kind: Literal["model", "dataset"]
    repo_id: str
    folder: Path

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.repo_id}"


def targets_of(names: Sequence[str], repo_id: str | None, save_dir: Path | None) -> list[Target]:
    """What the command line asks for.

    Args:
        names: known names, or `all-data`; may be empty where `repo_id` is given.
        repo_id: in place of the name's own repository.
        save_dir: in place of models/NAME or DATA_ROOT/NAME.

    Raises:
        DownloadError: nothing to fetch, an unknown name, or one value for several names.
    """
    known = f"known are {', '.join([*MODELS, *DATA_SETS, ALL_DATA])}"
    wanted = dict.fromkeys(  # each once, in the order given
        each for name in names for each in (DATA_SETS if name == ALL_DATA else [name])
    )
    if not wanted and repo_id:
        wanted = {repo_id.rpartition("/")[2]: None}
    elif unknown := [name for name in wanted if name not in MODELS | DATA_SETS]:
        raise DownloadError(f"{unknown[0]!r} is not a known name: {known}")
    if not wanted:
        raise DownloadError(f"nothing to fetch: name models or data sets; {known}")
    if len(wanted) > 1 and (repo_id or save_dir):
        raise DownloadError(
            f"--repo-id and --save-dir are for a single name, not for {', '.join(wanted)}: "
            "fetch them one by one"
        )
    targets = []
    for name in wanted:
        kind = "dataset" if name in DATA_SETS else "model"
        root = resolve_root() if kind == "dataset" else Path("models")
        source = repo_id or (MODELS | DATA_SETS)[name]
        targets.append(Target(kind, source, save_dir or root / name))
    return targets


def download(
    target: Target, patterns: Sequence[str], revision: str | None, max_workers: int
) -> None:
    """Fetch the files that match one of `patterns`; what is there already is not fetched again.

    The revision is resolved first, and that very commit is fetched: asked for a branch,
    snapshot_download would return a folder from an earlier day if the hub does not answer.

    Raises:
        DownloadError: whatever the hub, the network or the disk has against it.
    """
    import huggingface_hub as hub  # here, so that verifying does without it
    from huggingface_hub.errors import HTTPError

    # hf_xet, which moves the large files, raises RuntimeError. HTTPError covers the connection, and
    # HFValidationError of a malformed name is a ValueError.
    failures = (HTTPError, OSError, RuntimeError, ValueError)
    try:
        commit = hub.repo_info(target.repo_id, repo_type=target.kind, revision=revision).sha
        print(f"{target.url}, commit {commit}, to {target.folder}", flush=True)
        hub.snapshot_download(
            target.repo_id,
            repo_type=target.kind,
            revision=commit,
            local_dir=target.folder,
            allow_patterns=list(patterns),
            max_workers=max_workers,
        )
    except failures as error:
        raise DownloadError(explain(error, target, revision)) from error


def explain(error: Exception, target: Target, revision: str | None) -> str:
    """One line: what failed, and what helps."""
    from huggingface_hub import errors

    repo, again = target.repo_id, "run the same command again, it goes on where it stopped"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error):
        return (
            f"the disk of {target.folder} is full: free some space or choose another --save-dir, "
            f"then {again}"
        )
    texts = {  # the first that fits: an error of the hub is of several of these kinds
        errors.GatedRepoError: f"{repo} wants its terms accepted: do so at {target.url}, then log "
        "in with `hf auth login`",
        errors.RepositoryNotFoundError: f"there is no {target.kind} {repo} at {target.url}, or it "
        "is private: check --repo-id, or log in with `hf auth login`",
        errors.RevisionNotFoundError: f"{repo} has no revision {revision or 'main'}: check "
        f"--revision at {target.url}/commits/main",
        errors.HFValidationError: f"--repo-id {repo!r} is not of the form OWNER/NAME",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so nothing is fetched: unset it; "
        "--verify-only checks a folder without network",
        PermissionError: f"{target.folder} cannot be written to: choose another --save-dir",
    }
    for kind, text in texts.items():
        if isinstance(error, kind):
            return text
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, errors.HfHubHTTPError):
        refused = error.response.status_code in (401, 403)
        remedy = "log in with `hf auth login`" if refused else f"wait, then {again}"
        return f"the hub does not give out {repo} ({said}): {remedy}"
    return f"fetching {repo} failed ({said}): check network and proxy (HTTPS_PROXY), then {again}"


# ---- the report --------------------------------------------------------------------------------


@dataclass
class Report:
    """Lines about one folder, and how many of them are problems."""

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    table: str = ""
    problems: int = 0

    def add(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    def problem(self, label: str, text: str) -> None:
        self.add(label, f"PROBLEM: {text}")
        self.problems += 1

    def labelled(self, label: str) -> list[str]:
        return [text for name, text in self.lines if name == label]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.lines)
        body = [f"  {label:<{width}}  {text}" for label, text in self.lines]
        plural = "s" * (self.problems != 1)
        last = f"{self.problems} problem{plural}" if self.problems else "complete"
        return "\n".join([self.title, *body, *([self.table] if self.table else []), last])


def verify(folder: Path, kind: Literal["model", "dataset"] | None = None) -> Report:
    """Look at what a folder holds; without `kind`, as what it looks like.

    Raises:
        DownloadError: there is no such folder.
    """
    if not folder.is_dir():
        raise DownloadError(f"{folder} is not a folder: name one that a download has filled")
    if kind is None:
        kind = "dataset" if any(folder.glob("data/*.parquet")) else "model"
    return verify_data(folder) if kind == "dataset" else verify_model(folder)


# ---- models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeights:
    """Weights of one name ("ema" or "model") on disk."""

    file: str  # the file, or the index of its shards
    shapes: Mapping[str, tuple[int, ...] | None]  # None where the shard cannot be read
    absent: Sequence[str] = ()  # shards that the index names

    @property
    def expert(self) -> bool:
        """Whether there is a generation expert."""
        return any("moe_gen" in key for key in self.shapes)

    @property
    def heads(self) -> bool:
        """Whether there are latent heads; their table of positions alone is none."""
        return any(key.startswith(LATENT_HEADS) and key not in RECOMPUTED for key in self.shapes)


def verify_model(folder: Path) -> Report:
    """Configurations, tokenizer, weights and autoencoder of a checkpoint folder."""
    report = Report(f"{folder}, a checkpoint")
    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("*_config.json")):
        report.problem(
            "folder",
            "neither a checkpoint (llm_config.json, vit_config.json, *.safetensors) nor a data set "
            "(data/*.parquet)",
        )
        return report
    # the weights that load_pretrained prefers come first
    names = ("model", "ema") if (folder / "run.json").is_file() else ("ema", "model")
    check_unfinished(folder, report)
    unreadable = check_json(folder, report)
    config = read_config(folder, unreadable, report)
    check_tokenizer(folder, report)
    stored = [found for name in names if (found := read_weights(folder, name, report))]
    if not stored and not report.labelled("weights"):
        there = [file.name for file in folder.glob("*.safetensors")]
        report.problem(
            "weights",
            "no ema.safetensors or model.safetensors, whole or in shards with an index "
            f"(safetensors files there: {first(there) or 'none'})",
        )
    autoencoder = check_autoencoder(folder, unreadable, report)
    if config:
        model = meta(lambda: Bagel(config, visual_gen=True))
        for weights in stored:
            check_weights(weights, shapes_of(model), report)
        if autoencoder:
            report.table = memory_table(stages(model, autoencoder))
    if stored:
        say_whether_it_draws(folder, stored[0], report)
    return report


def check_unfinished(folder: Path, report: Report) -> None:
    """What the hub's client was fetching when it was stopped."""
    cache = folder / ".cache" / "huggingface" / "download"
    for part in sorted(cache.rglob("*.incomplete")):
        name = part.relative_to(cache).as_posix().partition(".incomplete")[0]
        report.problem(
            "download",
            f"{name} is not complete, {part.stat().st_size:,} bytes there; run the download again",
        )


def check_json(folder: Path, report: Report) -> set[str]:
    """Parse the configuration files; returns the names of those that are not valid."""
    unreadable = set()
    for file in sorted(folder.glob("*config.json")):
        try:
            json.loads(file.read_text())
        except ValueError as error:  # not JSON, or not text at all
            unreadable.add(file.name)
            report.problem("configuration", f"{file.name} is not valid json ({error}){mend(file)}")
    return unreadable


def read_config(folder: Path, unreadable: set[str], report: Report) -> BagelConfig | None:
    """The configuration of the model; None, and a line why, where there is none."""
    if unreadable & {"llm_config.json", "vit_config.json"}:
        return None
    try:
        config = BagelConfig.from_pretrained(folder)
    except ConfigError as error:
        report.problem("configuration", str(error))
        return None
    report.add(
        "configuration",
        f"decoder of {config.llm.num_hidden_layers} layers, width {config.llm.hidden_size}; "
        f"image encoder of {config.vit.num_hidden_layers}, width {config.vit.hidden_size}",
    )
    return config


def check_tokenizer(folder: Path, report: Report) -> None:
    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, TokenizerError) as error:
        report.problem("tokenizer", str(error))
    else:
        report.add("tokenizer", f"{tokenizer.vocab_size:,} entries")


def read_weights(folder: Path, name: str, report: Report) -> StoredWeights | None:
    """The keys and shapes of one name, from the headers of its files; None if there are none."""
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        shapes = read_shapes(single, "weights", report)
        return None if shapes is None else StoredWeights(single.name, shapes)
    if not index.is_file():
        return None
    try:
        table = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        report.problem("weights", f"{index.name} is not an index ({error!r}){mend(index)}")
        return None
    shards = sorted(set(table.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    other = {"ema": "model.safetensors", "model": "ema.safetensors"}[name]
    if not absent and other in shards and set(shards) <= {other, "ae.safetensors"}:
        # an index for other libraries: the files are looked at under their own names
        report.add("weights", f"{index.name} points to {', '.join(shards)}")
        return None
    present = {
        shard: read_shapes(folder / shard, "weights", report)
        for shard in shards
        if shard not in absent
    }
    shapes = {key: (present.get(shard) or {}).get(key) for key, shard in table.items()}
    for shard, inside in present.items():
        named = {key for key, place in table.items() if place == shard}
        if inside is not None and (lost := named - inside.keys()):
            report.problem(
                "weights", f"{shard} lacks {len(lost)} of the keys of the index{of(lost)}"
            )
    return StoredWeights(index.name, shapes, absent)


def read_shapes(file: Path, label: str, report: Report) -> Shapes | None:
    """Shapes in the header of a safetensors file, None if that cannot be read.

    A file of another size than its header says gets a line with both sizes.
    """
    actual = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(len(LFS_POINTER))
        handle.seek(8)
        length = int.from_bytes(start[:8], "little")
        text = handle.read(length) if length <= MAX_HEADER else b""
    if start == LFS_POINTER:
        report.problem(label, f"{file.name} is a pointer of Git LFS, not the file{mend(file)}")
        return None
    if len(start) < 8 or (length <= MAX_HEADER and len(text) < length):
        least = 8 + length if len(start) >= 8 else 8
        cut_off(file, f"more than {least:,}", actual, label, report)
        return None
    try:
        header = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        expected = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        report.problem(label, f"{file.name} is not a safetensors file{mend(file)}")
        return None
    if actual < expected:
        cut_off(file, f"{expected:,}", actual, label, report)
    else:
        try:
            with safe_open(str(file), framework="pt"):  # bytes beyond the end, gaps, wrong types
                pass
        except SafetensorError as error:
            report.problem(
                label,
                f"{file.name} is damaged ({error}): {expected:,} bytes expected, {actual:,} "
                f"there{mend(file)}",
            )
    return shapes


def cut_off(file: Path, expected: str, actual: int, label: str, report: Report) -> None:
    report.problem(
        label, f"{file.name} is truncated: {expected} bytes expected, {actual:,} there{mend(file)}"
    )


def check_weights(weights: StoredWeights, model: Shapes, report: Report) -> None:
    """Compare with the model, less the parts that the weights do not have at all."""
    wanted = {
        key: shape
        for key, shape in model.items()
        if not is_generation_key(key) or weights.heads or (weights.expert and "moe_gen" in key)
    }
    misfits = compare(wanted, weights.shapes)
    parts = misfits or [f"{len(weights.shapes):,} keys fit"]
    if weights.absent:
        plural = "s" * (len(weights.absent) != 1)
        parts.append(f"{len(weights.absent)} shard{plural} missing: {first(weights.absent)}")
    add = report.problem if misfits or weights.absent else report.add
    add("weights", f"{weights.file}: {'; '.join(parts)}")


def compare(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...] | None]
) -> list[str]:
    """What does not fit, by kind; empty if all does.

    The fixed tables are computed anew on loading and may be absent or of another side length.
    """
    fixed = set(RECOMPUTED)
    misfits = []
    if missing := wanted.keys() - found.keys() - fixed:
        misfits.append(f"{len(missing)} missing{of(missing)}")
    if unexpected := found.keys() - wanted.keys() - fixed:
        misfits.append(f"{len(unexpected)} unexpected{of(unexpected)}")
    wrong = [
        f"{key} has {found[key]}, not {wanted[key]}"
        for key in wanted.keys() & found.keys() - fixed
        if found[key] not in (None, wanted[key])
    ]
    if wrong:
        misfits.append(f"{len(wrong)} of another shape{of(wrong)}")
    return misfits


def check_autoencoder(folder: Path, unreadable: set[str], report: Report) -> AutoEncoder | None:
    """Look at `ae.safetensors` if it is there; returns the meta-device autoencoder."""
    if "vae_config.json" in unreadable:
        return None
    try:
        config = VAEConfig.from_pretrained(folder)
    except ConfigError as error:
        report.problem("autoencoder", str(error))
        return None
    model = meta(lambda: AutoEncoder(config))
    file = folder / "ae.safetensors"
    if not file.is_file():
        return model
    shapes = read_shapes(file, "autoencoder", report)
    if shapes is not None:
        misfits = compare(shapes_of(model), shapes)
        add = report.problem if misfits else report.add
        add("autoencoder", f"{file.name}: {'; '.join(misfits) or f'{len(shapes)} keys fit'}")
    return model


def say_whether_it_draws(folder: Path, weights: StoredWeights, report: Report) -> None:
    """A checkpoint of the understanding path is complete in itself: Visual-OPSD uses no other."""
    lacking = {
        "generation expert": weights.expert,
        "latent heads": weights.heads,
        "ae.safetensors": (folder / "ae.safetensors").is_file(),
    }
    absent = [f"no {part}" for part, there in lacking.items() if not there]
    if absent:
        report.add(
            "drawing",
            f"cannot draw: {', '.join(absent)}. Text, Visual-OPSD and the SFT baseline need none",
        )
    elif not report.problems:
        report.add("drawing", "can draw")


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def shapes_of(model: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def first(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")


def of(names: Collection[str]) -> str:
    return f" (first: {first(names)})" if names else ""


def mend(file: Path) -> str:
    """The hub's client trusts its notes on what it has fetched, so a bad file has to go first."""
    return f"; remove {file} and download again"


# ---- memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Bytes that one use keeps on a GPU from step to step."""

    name: str
    sharded: int  # spread over the GPUs
    everywhere: int  # on each of them
    trains: bool = True

    def each_of(self, gpus: int) -> int:
        return -(-self.sharded // gpus) + self.everywhere


def stages(model: Bagel, autoencoder: AutoEncoder) -> list[Stage]:
    """What weights and training state take, from the values that the modules have.

    Training keeps master weights, gradients and both Adam moments in float32, which FSDP spreads;
    Visual-OPSD also the EMA teacher, likewise, and on each GPU the bfloat16 copy that rollouts run
    on. The fixed position tables are float32 on every GPU, once per network; the autoencoder is
    frozen.
    """
    whole = [value.numel() for value in model.parameters()]
    understanding = [p.numel() for key, p in model.named_parameters() if not is_generation_key(key)]
    latents, table = model.latent_pos_embed.pos_embed, model.vit_pos_embed.pos_embed
    P, U, A = sum(whole), sum(understanding), sum(p.numel() for p in autoencoder.parameters())
    und_tables = 4 * table.numel()
    all_tables = und_tables + 4 * latents.numel()
    weights, gradients, moments, average, bfloat16 = 4, 4, 8, 4, 2
    trained = weights + gradients + moments
    return [
        Stage("text-only inference, bf16", 0, bfloat16 * U + und_tables, trains=False),
        Stage("drawing, bf16", 0, bfloat16 * (P + A) + all_tables, trains=False),
        Stage("Visual-OPSD", (trained + average) * U, bfloat16 * U + 3 * und_tables),
        Stage("interleaved SFT", trained * P, weights * A + all_tables),
    ]


def memory_table(rows: Sequence[Stage]) -> str:
    """A table of GiB (MiB for a miniature) per stage, and what comes on top."""
    name, unit = (
        ("GiB", 2**30) if max(stage.each_of(1) for stage in rows) >= 2**30 else ("MiB", 2**20)
    )
    lines = [f"  {f'memory in {name}':<26}  {'one GPU':>8}  {f'each of {GPUS}':>9}"]
    for stage in rows:
        each = f"{stage.each_of(GPUS) / unit:.1f}" if stage.trains else "-"
        lines.append(f"  {stage.name:<26}  {stage.each_of(1) / unit:8.1f}  {each:>9}")
    lines.append(
        "  Weights and training state of the whole model of these configuration files; activations,"
    )
    lines.append("  the KV cache and the weights that FSDP gathers layer by layer come on top.")
    return "\n".join(lines)


# ---- data sets ---------------------------------------------------------------------------------


def verify_data(folder: Path) -> Report:
    """Footers, row counts and columns of the parquet files of a data set."""
    report = Report(f"{folder}, a data set")
    check_unfinished(folder, report)
    folder = folder.resolve()  # its name says which data set it is
    rows, columns = {}, {}
    for file in sorted((folder / "data").glob("*.parquet")):
        schema = check_parquet(file, rows, report)
        if schema is not None:
            columns[file.name] = schema
    try:
        train = [file.name for file in find_files(folder.parent, folder.name, "train")]
        if not report.problems:  # as the trainers open it
            ParquetSource(folder.parent, folder.name, "train", OPSD_FIELDS)
    except DataError as error:
        report.problem("train", str(error))
        return report
    count_rows(folder.name, sum(rows.get(name, 0) for name in train), report)
    without = [name for name in train if "full_text_only_thought" not in columns.get(name, ())]
    if without and not report.problems:
        report.add(
            "columns",
            "warning: no full_text_only_thought: enough for OPSD, not for the SFT baseline",
        )
    elif not report.problems:
        report.add("columns", "all that training reads")
    return report


def check_parquet(file: Path, rows: dict[str, int], report: Report) -> list[str] | None:
    """Read a footer: the column names, and the number of rows into `rows`; None if damaged."""
    try:
        with pq.ParquetFile(file) as handle:
            rows[file.name] = handle.metadata.num_rows
            columns = handle.schema_arrow.names
    except (pa.ArrowInvalid, OSError) as error:
        size = file.stat().st_size
        with file.open("rb") as handle:
            begins = handle.read(4) == b"PAR1"
        what = "is truncated: its end is missing" if begins else "is not a parquet file"
        reason = " ".join(str(error).split())
        report.problem("file", f"{file.name} {what}, {size:,} bytes there ({reason}){mend(file)}")
        return None
    report.add("file", f"{file.name}: {rows[file.name]:,} rows")
    return columns


def count_rows(name: str, total: int, report: Report) -> None:
    known = TRAIN_ROWS.get(name)
    text = f"{total:,} rows to train on"
    if known not in (None, total):
        text = f"warning: {text}, the released {name} has {known:,}"
    report.add("train", text)


# ---- the command line --------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    known = [f"  {name:<20} {repo}" for name, repo in (MODELS | DATA_SETS).items()]
    parser = argparse.ArgumentParser(
        prog="python download_model.py",
        description="Fetch base models and data sets from huggingface.co, then verify what arrived."
        " A download that was stopped goes on when the same command runs again.",
        epilog="\n".join(
            ["names and their repositories:", *known, f"  {ALL_DATA:<20} the four data sets"]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="what to fetch; see the list below")
    add("--repo-id", metavar="OWNER/NAME", help="repository in place of the one of the name")
    add("--save-dir", type=Path, metavar="DIR", help="in place of models/NAME or DATA_ROOT/NAME")
    add(
        "--allow-pattern",
        action="append",
        metavar="GLOB",
        help="files to fetch, may be repeated; replaces the default "
        + ", ".join(PATTERNS["model"])
        + " (data sets: "
        + ", ".join(PATTERNS["dataset"])
        + ")",
    )
    add("--revision", metavar="REV", help="branch, tag or commit; a commit pins the download")
    add("--max-workers", type=int, default=8, metavar="N", help="files at a time (default 8)")
    add(
        "--verify-only",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="fetch nothing, verify these folders of models or data sets",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks; returns how many problems there are.

    Raises:
        DownloadError: it cannot be done.
    """
    if args.verify_only:
        if args.names or args.repo_id or args.save_dir:
            raise DownloadError("--verify-only fetches nothing: give it folders, and no names")
        return sum(show(verify(folder)) for folder in args.verify_only)
    if args.max_workers < 1:
        raise DownloadError(f"--max-workers {args.max_workers}: at least one is needed")
    problems = 0
    for target in targets_of(args.names, args.repo_id, args.save_dir):
        patterns = args.allow_pattern or PATTERNS[target.kind]
        download(target, patterns, args.revision, args.max_workers)
        problems += show(verify(target.folder, target.kind))
    return problems


def show(report: Report) -> int:
    print(report, flush=True)
    return report.problems


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 complete, 1 with problems, 2 where it could not be done."""
    try:
        return 1 if run(parse(argv)) else 0
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
