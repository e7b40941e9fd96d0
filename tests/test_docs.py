"""The documents: what they name exists (links, files, modules, commands, flags, metrics), what
they list is complete, and their examples run.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import PIL.Image
import pytest

from data.mixture import MixtureConfig
from data.parquet import ParquetSource
from eval import kl_diagnostic
from eval import run as accuracy
from tests.training import all_lines, run_opsd, run_sft
from train.config import OpsdConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"-m ((?:data|modeling|train|eval|examples|tests)\b[\w.]*)")
FILE = re.compile(r"^\.?[\w.-]+(/[\w.-]+)*(\.(py|sh|yaml|md|txt|toml)|/)$")
# A path that begins with a folder of the repository, wherever it stands.
REPOSITORY_PATH = re.compile(
    r"(?<![\w./*-])((?:data|docs|eval|examples|modeling|models/mini-base|scripts|tests|train|\.ci)"
    r"/[\w./-]*\w|models/mini-base)"
)
# Written by runs, downloaded, or an example of the reader's own.
NOT_IN_GIT = ("results/", "checkpoints/", "models/", "datasets/", "/", ".venv")

FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
COMMAND = re.compile(r"(?: -m|\bbash) ([\w./]+)([^`|\n#]*)")
TRAINERS = {"train.opsd": OpsdConfig, "train.sft": SftConfig}
OTHER_MODULES = (
    "download_model",
    "data.miniworld",
    "data.miniworld.model",
    "data.miniworld.autoencoder",
    "data.miniworld.benchmarks",
    "eval.attention",
    "eval.backends.tiny_vlm",
    "eval.cases",
    "eval.drawings",
    "eval.interleaved",
    "eval.kl_diagnostic",
    "eval.microscope",
    "eval.pairs",
    "eval.report",
    "eval.reproduce",
    "eval.run",
    "eval.scores",
    "eval.serve",
    "eval.summary",
    "eval.table",
    "eval.theorem",
    "eval.token_classes",
    "examples.inference_demo",
    "tests.check_goldens",
    "train.plan",
)
SCRIPTS = (
    "scripts/quickstart.sh",
    "scripts/make_mini_base.sh",
    "scripts/evaluate_mini.sh",
    "scripts/reproduce_mini.sh",
)  # those with flags of their own
LAUNCHED = {  # launcher -> the module that reads its flags
    "scripts/visual_opsd/run_eval.sh": "eval.run",
    "scripts/visual_opsd/run_kl_diagnostic.sh": "eval.kl_diagnostic",
    "scripts/visual_opsd/run_interleaved_sft.sh": "train.sft",
    "scripts/visual_opsd/run_sft_baseline.sh": "train.sft",
    "scripts/visual_opsd/run_visual_opsd.sh": "train.opsd",
    "scripts/visual_opsd/run_visual_opsd_noise.sh": "train.opsd",
}
PLACEHOLDER = "--flag"  # as in [--flag value ...]
FLAGS_OF_OTHERS = {
    "--index-url",  # pip
    "--repo-type",
    "--local-dir",  # hf
    "--model",
    "--model_args",
    "--tasks",  # lmms-eval
    "--ntasks-per-node",  # srun
}


def text_of(document: Path) -> str:
    """The text, with the lines of a continued command joined."""
    return re.sub(r" *\\\n *", " ", document.read_text())


def commands(document: Path) -> list[str]:
    """Indented `bash ...` and `NAME=value bash ...` lines, comments removed."""
    lines = re.findall(r"^    ((?:[A-Z_]+=\S+ )*bash \S.*)$", text_of(document), re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", line) for line in lines]


LAUNCHES = sorted(
    {
        re.sub(r"\s*\[.*$", "", command)
        for document in DOCUMENTS
        for command in commands(document)
        if "visual_opsd/run_" in command
    }
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(text_of(document)) if "://" not in link]
    missing = [target for target in targets if target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    quoted = {name for name in CODE.findall(text_of(document)) if FILE.match(name)}
    named = {
        name
        for name in quoted
        if ("/" in name or name.endswith((".md", ".txt", ".toml")))
        and not name.startswith(NOT_IN_GIT)
    }
    named |= set(REPOSITORY_PATH.findall(text_of(document)))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_modules_exist(document: Path) -> None:
    places = {m: ROOT.joinpath(*m.split(".")) for m in MODULE.findall(text_of(document))}
    missing = [
        module
        for module, place in places.items()
        if not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_scripts_exist(document: Path) -> None:
    scripts = [
        word
        for command in commands(document)
        for word in shlex.split(command.replace("[", "").replace("]", ""))
        if word.endswith(".sh") or word == ".ci/run"
    ]
    assert not [script for script in scripts if not (ROOT / script).is_file()]


@pytest.mark.parametrize("command", LAUNCHES)
def test_launcher_commands_build(command: str) -> None:
    """Each launcher command in a document is accepted, and its flags are flags of the trainer."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    module = words.index("-m") + 1
    given = {word for word in words[module + 1 :] if word.startswith("--")}
    assert given <= flags_of(words[module])


def test_the_documents_launch_every_launcher() -> None:
    shown = " ".join(LAUNCHES)
    scripts = sorted((ROOT / "scripts" / "visual_opsd").glob("run_*.sh"))
    assert not [script.name for script in scripts if script.name not in shown]


def fields(config: type) -> dict[str, object]:
    """Flag -> default of every section of a trainer's configuration."""
    sections = [section.type for section in dataclasses.fields(config)]
    return {f.name: f.default for section in sections for f in dataclasses.fields(section)}


@functools.cache
def flags_of(command: str) -> set[str]:
    """The flags of a module or script of the repository, as its parser or its --help has them."""
    if command in TRAINERS:
        return {"--help", *(f"--{name}" for name in fields(TRAINERS[command]))}
    if command in SCRIPTS:
        shown = subprocess.run(
            ["bash", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert shown.returncode == 0, shown.stderr
        return set(FLAG.findall(shown.stdout))
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(command), re.MULTILINE))


def help_of(module: str) -> str:
    """What `python -m module --help` prints."""
    try:
        entry = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        entry = importlib.import_module(module)
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [module, "--help"])
        entry.main()
    assert ended.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_of_a_command_are_its_own(document: Path) -> None:
    foreign = []
    for command, rest in COMMAND.findall(text_of(document)):
        name = LAUNCHED.get(command, command)
        if name in (*TRAINERS, *OTHER_MODULES, *SCRIPTS):
            given = set(FLAG.findall(rest)) - {PLACEHOLDER}
            foreign += [f"{command} {flag}" for flag in sorted(given - flags_of(name))]
    assert not foreign


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_is_known(document: Path) -> None:
    known = {PLACEHOLDER, *FLAGS_OF_OTHERS}
    known = known.union(*(flags_of(name) for name in (*TRAINERS, *OTHER_MODULES, *SCRIPTS)))
    assert not sorted(set(FLAG.findall(text_of(document))) - known)


def flag_table() -> dict[str, str]:
    """Flag -> default as TRAIN.md has them."""
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \|", text_of(ROOT / "TRAIN.md"), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a flag has two rows"
    return dict(rows)


def test_train_md_has_a_row_for_every_flag_and_no_other() -> None:
    assert flag_table().keys() == fields(OpsdConfig).keys() | fields(SftConfig).keys()


def test_train_md_has_the_defaults_of_the_code() -> None:
    documented = flag_table()
    for flag, default in fields(OpsdConfig).items():
        shown = documented[flag]
        if default is None:
            assert shown == "none", flag
        elif isinstance(default, float):
            assert float(shown) == default, flag
        else:
            assert shown == str(default), flag


def test_eval_md_has_the_flags_and_defaults_of_the_code() -> None:
    rows = re.findall(
        r"^\| `--(\w+)` \| (\S+) \| (\S+) \|", text_of(ROOT / "EVAL.md"), re.MULTILINE
    )
    required = {1: ["--output_dir", "required", "--systems", "required"]}
    required[2] = required[1][:2]
    for column, parse in ((1, accuracy.parse), (2, kl_diagnostic.parse)):
        documented = {row[0]: row[column] for row in rows if row[column] != "–"}
        defaults = vars(parse(required[column]))
        assert documented == {flag: shown(value) for flag, value in defaults.items()}


def shown(default: object) -> str:
    if isinstance(default, list):
        return ",".join(default) or "none"
    return "none" if default is None else str(default)


def test_train_md_has_the_metrics_of_a_run(tmp_path: Path) -> None:
    section = text_of(ROOT / "TRAIN.md").partition("| metric | meaning |")[2].partition("\n\n")
    rows = [line.split("|")[1] for line in section[0].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in CODE.findall(row)}
    run_opsd(tmp_path / "opsd", total_steps=1)
    (opsd,) = all_lines(tmp_path / "opsd")
    by_class = {re.sub("_of/.*", "_of/CLASS", name) for name in opsd}
    assert named == {re.sub("/(?!CLASS).*", "/TASK", name) for name in by_class} - {"step"}
    of_sft = re.search(r"`train\.sft` logs ([^.]*)\.", section[2])
    run_sft(tmp_path / "sft", total_steps=1)
    (sft,) = all_lines(tmp_path / "sft")
    assert set(CODE.findall(of_sft[1])) == sft.keys() - {"step"}


def code_block(document: Path, first_line: str) -> str:
    """The indented block that begins with the given line."""
    lines = document.read_text().splitlines()
    start = lines.index(f"    {first_line}")
    block = []
    for line in lines[start:]:
        if line and not line.startswith("    "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))


def test_the_rows_that_data_md_writes_can_be_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("maze.png", "maze_with_path.png"):
        PIL.Image.new("RGB", (20, 10)).save(name)
    exec(code_block(ROOT / "docs" / "data.md", "from pathlib import Path"), {})
    example = ParquetSource("datasets", "My_Task").example(0)
    assert (example.key, example.answer) == ("My_Task/1", "left")
    assert example.visual_thoughts[0].size == (20, 10)


def test_the_mixture_file_of_data_md_is_one(tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    start = "visual_opsd:                      # text_reasoning for SFT"
    file.write_text(code_block(ROOT / "docs" / "data.md", start))
    mixture = MixtureConfig.load(file)
    assert mixture.dataset_names == ("Visual_Search", "My_Task")
    assert mixture.vit_image_transform_args.image_stride == 14


PAPER = {  # App. C
    "lr": 1e-5,
    "min_lr": 1e-7,
    "schedule": "cosine",
    "warmup_steps": 200,
    "total_steps": 1000,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-15,
    "max_grad_norm": 1.0,
    "global_batch": 16,  # 8 GPUs x 1 x 2 accumulation steps
    "jsd_beta": 0.5,
    "jsd_temperature": 1.0,
    "jsd_top_k": 256,
    "jsd_token_clip": 0.05,
    "jsd_weight": 1.0,
    "ce_weight": 0.0,
    "noise_vt": False,
    "ema_decay": 0.995,
    "teacher_mode": "ema",
    "sample_max_new_tokens": 1024,
    "sample_max_image_skips": 1,
    "max_forward_tokens": 10240,
}


def test_the_defaults_are_the_papers_run() -> None:
    defaults = fields(OpsdConfig)
    assert {flag: defaults[flag] for flag in PAPER} == PAPER
