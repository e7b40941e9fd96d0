"""Flags, presets and defaults of the trainers."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.mixture import GROUPS, MixtureConfig
from train.config import (
    RANK_ZERO_HEAD_START,
    DataArguments,
    DistillArguments,
    ModelArguments,
    RunArguments,
    SamplingArguments,
    UsageError,
    parse_opsd,
    parse_sft,
    save_config,
)
from train.optim import OptimConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "data" / "configs"
PARTS = (
    ModelArguments,
    DataArguments,
    OptimConfig,
    RunArguments,
    DistillArguments,
    SamplingArguments,
)
PAPER = {  # optimisation shared by OPSD and the SFT baseline
    "optim.lr": 1e-5,
    "optim.min_lr": 1e-7,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 200,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.eps": 1e-15,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "run.global_batch": 16,
}
PAPER_OPSD = PAPER | {
    "model.model_path": "models/ThinkMorph-7B",
    "data.dataset_config_file": "data/configs/visual_opsd.yaml",
    "optim.total_steps": 1000,
    "distill.teacher_mode": "ema",
    "distill.ema_decay": 0.995,
    "distill.noise_vt": False,
    "distill.jsd_weight": 1.0,
    "distill.jsd_beta": 0.5,
    "distill.jsd_temperature": 1.0,
    "distill.jsd_top_k": 256,
    "distill.jsd_top_k_mode": "renorm",
    "distill.jsd_token_clip": 0.05,
    "distill.jsd_clip_mode": "entry",
    "distill.jsd_loss_kind": "jsd",
    "distill.ce_weight": 0.0,
    "sampling.sample_max_new_tokens": 1024,
    "sampling.sample_temperature": 1.0,
    "sampling.sample_max_image_skips": 1,
    "sampling.max_forward_tokens": 10240,
    "sampling.min_completion": 128,
}
PAPER_SFT = PAPER | {
    "model.model_path": "models/BAGEL-7B-MoT",
    "data.dataset_config_file": "data/configs/text_reasoning.yaml",
    "optim.total_steps": 2000,
}


def values(config, names):
    return {
        name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names
    }


def rejected(capsys, parse, *argv) -> str:
    """The message of a command line that must end with status 2: the last line of stderr."""
    with pytest.raises(SystemExit) as exit_:
        parse([str(part) for part in argv])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2, lines  # how to call it, what was wrong
    return lines[-1]


@pytest.mark.parametrize(("parse", "expected"), [(parse_opsd, PAPER_OPSD), (parse_sft, PAPER_SFT)])
def test_defaults_are_the_papers_run(parse, expected):
    assert values(parse([]), expected) == expected


@pytest.mark.parametrize(
    ("parse", "section", "expected"),
    [(parse_opsd, "opsd", PAPER_OPSD), (parse_sft, "sft", PAPER_SFT)],
)
def test_the_paper_preset_spells_the_defaults_out(parse, section, expected):
    path = str(CONFIGS / "paper.yaml")
    config = parse(["--preset", path])
    without = dataclasses.replace(config, run=dataclasses.replace(config.run, preset=None))
    assert without == parse([])
    written = yaml.safe_load(Path(path).read_text())[section]
    assert written == {name.split(".")[1]: value for name, value in expected.items()}


def test_preset_changes_defaults_and_the_command_line_wins(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text(
        "opsd: {lr: 1e-3, total_steps: 300, noise_vt: true, data_root: here}\nsft: {lr: 2}"
    )
    config = parse_opsd(["--preset", str(preset), "--total_steps", "400", "--jsd_beta", "0.25"])
    assert config.optim.lr == 1e-3  # which yaml reads as text
    assert config.optim.total_steps == 400
    assert config.distill.noise_vt is True
    assert config.distill.jsd_beta == 0.25
    assert config.data.data_root == "here"
    assert parse_opsd(["--preset", str(preset), "--noise_vt", "False"]).distill.noise_vt is False
    assert parse_sft(["--preset", str(preset)]).optim.lr == 2.0


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--jsd_betta", "0.5"], "error: unrecognized arguments: --jsd_betta 0.5"),
        (["--jsd_bet", "0.5"], "--jsd_bet"),
        (["--total_step=3"], "--total_step"),
        (["stray"], "stray"),
        (["--total_steps", "many"], "--total-steps: invalid int value: 'many'"),
        (["--teacher_mode", "mean"], "--teacher-mode: invalid choice: 'mean'"),
        (["--noise_vt", "perhaps"], "perhaps"),
        (["--global_batch", "0"], "--global_batch must be at least 1, got 0"),
        (["--total_steps", "100"], "warmup_steps=200 must lie between 0 and total_steps=100"),
        (["--total_steps", "0", "--warmup_steps", "0"], "total_steps=0: a run needs"),
        (["--sample_max_new_tokens", "64"], "--min_completion 128 must lie between 1 and"),
        (["--sample_temperature", "-1"], "temperature must be >= 0"),
        (["--sample_max_image_skips", "-1"], "--sample_max_image_skips"),
        (["--ema_decay", "1.5"], "--ema_decay"),
        (["--jsd_weight", "0"], "--jsd_weight 0.0 and --ce_weight 0.0"),
        (["--jsd_temperature", "0"], "temperature=0.0 must be positive"),
        (["--preset", "data/configs/none.yaml"], "data/configs/none.yaml: no such file"),
    ],
)
def test_bad_flags_end_with_a_message(capsys, argv, named):
    assert named in rejected(capsys, parse_opsd, *argv)


def test_flags_of_distillation_are_unknown_to_sft(capsys):
    assert "--teacher_mode" in rejected(capsys, parse_sft, "--teacher_mode", "ema")


@pytest.mark.parametrize("beta", ["0", "1"])
def test_entry_clip_needs_beta_between_zero_and_one(capsys, beta):
    message = rejected(capsys, parse_opsd, "--jsd_beta", beta)
    assert f"beta={float(beta)} with an entry clip of 0.05" in message
    assert "clip_mode='token' or 'off'" in message
    for remedy in (
        ["--jsd_clip_mode", "token"],
        ["--jsd_clip_mode", "off"],
        ["--jsd_token_clip", "0"],
    ):
        assert parse_opsd(["--jsd_beta", beta, *remedy]).distill.jsd.beta == float(beta)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("opsd: {lr: 1e-3, jsd_betta: 0.5}", "jsd_betta in 'opsd' are not flags"),
        ("opsd: {total_steps: many}", "total_steps: 'many' is not of type int"),
        ("opsd: {total_steps: 3.5}", "total_steps: 3.5 is not of type int"),
        ("opsd: {total_steps: true}", "total_steps: True is not of type int"),
        ("opsd: {lr: fast}", "lr: 'fast' is not a number"),
        ("opsd: {lr: null}", "lr: None is not a number"),
        ("opsd: {noise_vt: 1}", "noise_vt: 1 is not of type bool"),
        ("opsd: {teacher_mode: mean}", "teacher_mode: 'mean' is not one of"),
        ("opsd: {compute_dtype: float16}", "compute_dtype: 'float16' is not one of"),
        ("opsd: {data_root: 3}", "data_root: 3 is not of type str"),
        ("opsd: {jsd_beta: 0}", "beta=0.0 with an entry clip"),
        ("sft: {lr: 1}", "has no section 'opsd' (has: sft)"),
        ("opsd:", "has no section 'opsd'"),
        ("- opsd", "has no section 'opsd'"),
        ("opsd: {lr", "is not yaml"),
    ],
)
def test_bad_presets_end_with_a_message(capsys, tmp_path, text, named):
    preset = tmp_path / "bad.yaml"
    preset.write_text(text)
    message = rejected(capsys, parse_opsd, "--preset", preset)
    assert named in message
    if "clip" not in named:
        assert str(preset) in message


def test_no_traceback_and_status_two_from_the_shell():
    command = [sys.executable, "-m", "train.opsd", "--jsd_betta", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = "python -m train.opsd: error: unrecognized arguments: --jsd_betta 0.5"
    assert done.stderr.splitlines()[1:] == [said]  # below the usage


@pytest.mark.parametrize("argv", [["--jsd_betta", "0.5"], ["--lr", "fast"], ["--lr", "-1"]])
def test_only_rank_zero_speaks_and_it_may_finish(capsys, monkeypatch, argv):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    assert "error: " in rejected(capsys, parse_opsd, *argv)
    assert waited == []
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as exit_:
        parse_opsd(argv)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "")
    assert waited == [RANK_ZERO_HEAD_START]


def test_only_rank_zero_helps(capsys, monkeypatch):
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            parse_sft(["--help"])
        assert exit_.value.code == 0
        out, err = capsys.readouterr()
        assert (("--total_steps" in out), err) == (shown, "")


def test_every_field_has_a_reader():
    read = set()
    for file in (ROOT / "train").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    fields = {
        f"{part.__name__}.{field.name}" for part in PARTS for field in dataclasses.fields(part)
    }
    assert {name for name in fields if name.split(".")[1] not in read} == set()


def test_every_flag_has_a_name_of_its_own():
    names = [field.name for part in PARTS for field in dataclasses.fields(part)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    tree = yaml.safe_load(path.read_text())
    if set(tree) & set(GROUPS):
        mixture = MixtureConfig.load(path)
        assert mixture.dataset_names == tuple(tree[mixture.group]["dataset_names"])
        return
    parsers = {"opsd": parse_opsd, "sft": parse_sft}
    assert tree.keys() <= parsers.keys(), f"{path} holds sections that nothing reads"
    for section, settings in tree.items():
        config = parsers[section](["--preset", str(path)])
        flat = {k: v for part in dataclasses.asdict(config).values() for k, v in part.items()}
        assert flat["preset"] == str(path)
        for name, value in settings.items():
            assert flat[name] == (float(value) if isinstance(flat[name], float) else value), name


def test_saved_config_holds_every_value(tmp_path):
    config = parse_opsd(["--lr", "3e-4", "--noise_vt", "True"])
    save_config(config, tmp_path / "new" / "config.yaml")
    saved = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert saved == dataclasses.asdict(config)
    assert saved["optim"]["lr"] == 3e-4


def test_usage_error_is_a_value_error():
    """Parsing turns every ValueError of a part into a message; ours must be among them."""
    with pytest.raises(ValueError, match="--save_every must be at least 1, got 0"):
        RunArguments(save_every=0)
    assert issubclass(UsageError, ValueError)
