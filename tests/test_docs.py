"""The documents: links, files, modules and commands they name exist; TRAIN.md lists every flag."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from train.config import OpsdConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"-m ((?:data|modeling|train|eval|examples|tests|benchmarks)\b[\w.]*)")
# Written by runs, downloaded, or an example of the reader's own.
NOT_IN_GIT = ("results/", "checkpoints/", "models/", "datasets/", "/", ".venv")
FILE = re.compile(r"^\.?[\w.-]+(/[\w.-]+)*(\.(py|sh|yaml|md|txt|toml)|/)$")


def text_of(document: Path) -> str:
    return document.read_text()


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
    named = {name for name in CODE.findall(text_of(document)) if FILE.match(name)}
    missing = [
        name
        for name in sorted(named)
        if ("/" in name or name.endswith((".md", ".txt", ".toml")))
        and not name.startswith(NOT_IN_GIT)
        and not (ROOT / name).exists()
    ]
    assert not missing


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
    given = {word[2:] for word in words[words.index("-m") + 2 :] if word.startswith("--")}
    if "train.opsd" in words:
        assert given <= fields(OpsdConfig).keys()
    if "train.sft" in words:
        assert given <= fields(SftConfig).keys()


def test_the_documents_launch_every_launcher() -> None:
    shown = " ".join(LAUNCHES)
    scripts = sorted((ROOT / "scripts" / "visual_opsd").glob("run_*.sh"))
    assert not [script.name for script in scripts if script.name not in shown]


def fields(config: type) -> dict[str, object]:
    """Flag -> default of every section of a trainer's configuration."""
    sections = [section.type for section in dataclasses.fields(config)]
    return {f.name: f.default for section in sections for f in dataclasses.fields(section)}


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
