"""The house: imports run downwards, the model is single-device code, modules come from here."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file imports its own package and lower floors, never a neighbour or a higher one. On the third
# floor the inferencer comes before train, whose teacher draws with it.
FLOORS = {
    "modeling": 1,
    "data": 2,
    "inferencer": 3,
    "train": 3.5,
    "benchmarks": 4,
    "eval": 4,
    "examples": 4,
    "scripts": 4,
}
PACKAGES = ["modeling", "data", "train", "eval", "benchmarks"]
NOT_CODE = {"results", "checkpoints", "datasets", "models", "wandb", "runs"}


def sources() -> list[Path]:
    """Every Python file of the repository, generated folders and environments left out."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(
        path
        for path in paths
        if not path.parts[0].startswith(".") and path.parts[0] not in NOT_CODE
    )


def top_level(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def upward_imports(name: str, source: str) -> list[str]:
    """Imports of a file of the package `name` that go to neighbours on its floor, or higher."""
    found = []
    for line, target in imports(ast.parse(source)):
        other = target.split(".")[0]
        if (
            other != name
            and FLOORS.get(other, 0) >= FLOORS[name]
            and not allowed_sideways(name, other)
        ):
            found.append(f"line {line} imports {target}")
    return found


def allowed_sideways(name: str, other: str) -> bool:
    """Floor 4 holds entry points; an example or a script may use the library part of eval."""
    return FLOORS[name] == FLOORS[other] == 4 and other == "eval"


def model_violations(source: str) -> list[str]:
    """Collectives, environment variables, command line or terminal in model code."""
    tree = ast.parse(source)
    found = [
        f"line {line} imports {name}"
        for line, name in imports(tree)
        if name.startswith(("torch.distributed", "argparse", "os.environ", "os.getenv"))
    ]
    for node in ast.walk(tree):
        if dotted(node).startswith(("torch.distributed", "os.environ", "os.getenv")):
            found.append(f"line {node.lineno} uses {dotted(node)}")
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            found.append(f"line {node.lineno} prints")
    return found


def private_or_path_violations(source: str) -> list[str]:
    """Edits of sys.path, and private torch or FSDP interfaces."""
    tree = ast.parse(source)
    found = [
        f"line {line} imports {name}"
        for line, name in imports(tree)
        if name.startswith("torch.") and any(part.startswith("_") for part in name.split("."))
    ]
    for node in ast.walk(tree):
        name = dotted(node)
        first, *rest = name.split(".")
        if name.startswith("sys.path"):
            found.append(f"line {node.lineno} touches sys.path")
        if first in {"torch", "fsdp", "FSDP"} and any(
            p.startswith("_") and p[1] != "_" for p in rest
        ):
            found.append(f"line {node.lineno} uses {name}")
    return found


def test_imports_run_downwards() -> None:
    upward = {
        str(path): found
        for path in sources()
        if top_level(path) in FLOORS
        and (found := upward_imports(top_level(path), (ROOT / path).read_text()))
    }
    assert not upward


def test_the_model_is_single_device_code() -> None:
    found = {
        str(path): violations
        for path in sources()
        if top_level(path) == "modeling"
        and (violations := model_violations((ROOT / path).read_text()))
    }
    assert not found


def test_no_path_edits_and_public_torch_only() -> None:
    found = {
        str(path): violations
        for path in sources()
        if path.parts[0] not in {"tests", "benchmarks"}
        and (violations := private_or_path_violations((ROOT / path).read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("modeling", "from data.contexts import student_context", True),
        ("modeling", "import train.losses", True),
        ("data", "from modeling.sequence import pack", False),
        ("data", "from eval.scoring import score", True),
        ("train", "from data.answers import answers_match", False),
        ("train", "import inferencer", False),
        ("inferencer", "from train.config import Config", True),
        ("eval", "from train.losses import token_kl", False),
        ("eval", "from examples.inference_demo import main", True),
        ("examples", "from eval.summary import table", False),
    ],
)
def test_the_import_rule_itself(name: str, line: str, wrong: bool) -> None:
    assert bool(upward_imports(name, line)) == wrong


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import FullyShardedDataParallel",
        "import argparse",
        "import os; x = os.environ.get('A')",
        "from os import environ",
        "def f(): print(1)",
    ],
)
def test_the_model_rule_itself(line: str) -> None:
    assert model_violations(line)


@pytest.mark.parametrize(
    "line",
    [
        "import sys; sys.path.insert(0, '.')",
        "from torch._inductor import config",
        "import torch._dynamo",
        "import torch; torch._dynamo.reset()",
        "fsdp._handle.flat_param",
    ],
)
def test_the_private_rule_itself(line: str) -> None:
    assert private_or_path_violations(line)
    assert not private_or_path_violations("import torch; torch.__version__; torch.nn.Linear")


def test_every_root_package_is_a_package() -> None:
    """An installed package of the same name would win over a folder without __init__.py."""
    folders = {path.parts[0] for path in sources() if len(path.parts) > 1}
    missing = {name for name in folders if not (ROOT / name / "__init__.py").is_file()}
    assert not missing


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_resolve_inside_the_repository(name: str) -> None:
    module = sys.modules.get(name) or importlib.import_module(name)
    assert Path(module.__file__).parent == ROOT / name


def test_nothing_is_installable() -> None:
    """data, train and eval are too generic to be put into anybody's environment."""
    assert not (ROOT / "setup.py").exists()
    assert "\n[project]" not in (ROOT / "pyproject.toml").read_text()
