"""The plan of the reproduction and its runner: commands that are accepted, order, going on."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval import reproduce
from eval.artefacts.catalogue import ALIASES, ARTEFACTS, artefact
from eval.artefacts.runs import PLAN, RunPlan
from eval.experiments import MINI, PAPER, SCALES, Plan, Step, quick
from train.config import UsageError, parse_opsd, parse_sft

ROOT = Path(__file__).resolve().parents[1]
PLANS = {
    "mini": Plan(MINI, "reproduction", 3),
    "quick": Plan(quick(MINI), "reproduction-quick", 2),
    "paper": Plan(PAPER, "reproduction-paper", 3),
}


@pytest.fixture(params=PLANS)
def plan(request) -> Plan:
    return PLANS[request.param]


def test_steps_come_after_what_they_need(plan):
    names = list(plan.steps)
    assert len(set(names)) == len(names)
    for place, step in enumerate(plan.steps.values()):
        assert set(step.needs) <= set(names[:place]), step.name


def launched(step: Step) -> list[str]:
    """What a launcher hands to its module."""
    env = {**os.environ, **step.environment, "DRY_RUN": "1"}
    out = subprocess.run(
        step.command, env=env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return shlex.split(out.stdout)


@pytest.mark.parametrize("name", PLANS)
def test_every_command_is_accepted_by_what_it_runs(name):
    plan, kinds = PLANS[name], set()
    for step in plan.steps.values():
        kind = (step.name.split("/")[-1] if step.name.startswith("seed") else step.name, len(kinds))
        words = list(step.command)
        if words[0] == "bash":
            if step.name.startswith(("seed1", "seed2")):  # the same as of seed 0
                continue
            words = launched(step)
        module = words[words.index("-m") + 1]
        given = words[words.index("-m") + 2 :]
        kinds.add(kind)
        if module == "train.opsd":
            config = parse_opsd(given)
            assert config.run.resume == "auto"
            assert config.run.results_dir == f"results/{plan.name}/{step.name}"
        elif module == "train.sft":
            assert parse_sft(given).run.results_dir == f"results/{plan.name}/{step.name}"
        elif not module.startswith("data."):
            importlib.import_module(module).parse(given)
    assert len(kinds) > 10


def test_the_runs_of_a_scale_have_its_budgets():
    for scale in (MINI, PAPER):
        plan = Plan(scale, "name", 1)
        steps = {
            name: (parse_sft if "sft" in name else parse_opsd)(
                launched(plan.steps[name])[launched(plan.steps[name]).index("-m") + 2 :]
            )
            for name in ("seed0/opsd", "seed0/noise", "seed0/sft", "seed0/sft_base")
        }
        assert steps["seed0/opsd"].optim.total_steps == scale.steps
        assert steps["seed0/sft"].optim.total_steps == 2 * scale.steps
        assert steps["seed0/sft_base"].optim.total_steps == scale.steps
        assert steps["seed0/noise"].distill.noise_vt and not steps["seed0/opsd"].distill.noise_vt
        main, half = steps["seed0/opsd"], plan.steps["sweep/default"]
        words = launched(half)
        swept = parse_opsd(words[words.index("-m") + 2 :])
        assert swept.optim.total_steps * 2 == main.optim.total_steps
        assert swept.distill == main.distill
        assert str(main.distill.jsd_top_k) == scale.defaults["jsd_top_k"]
        assert main.distill.jsd_token_clip == float(scale.defaults["jsd_token_clip"])
        assert main.distill.jsd_beta == float(scale.defaults["jsd_beta"])
        assert main.distill.ema_decay == float(scale.defaults["ema_decay"])
        assert main.distill.teacher_mode == scale.defaults["teacher_mode"]


def test_a_sweep_changes_one_knob_and_drops_the_clip_at_the_ends_of_beta():
    plan = Plan(PAPER, "name", 1)
    default = plan.steps["sweep/default"].command
    for knob, values in PAPER.sweeps.items():
        for value in values:
            more = plan.steps[f"sweep/{knob}-{value}"].command[len(default) :]
            ends = knob == "jsd_beta" and value in ("0", "1")
            assert more == (f"--{knob}", value, *(("--jsd_token_clip", "0") if ends else ()))


def test_only_takes_what_an_artefact_needs():
    plan = PLANS["mini"]
    names = [step.name for step in plan.chosen(artefact("table1").needs)]
    assert "seed2/kl" in names and "seed0/opsd" in names and "seed0/data" in names
    assert not [name for name in names if name.startswith(("sweep", "attention")) or "own" in name]
    assert [step.name for step in plan.chosen(["theorem"])] == ["theorem"]
    for name in ARTEFACTS:
        assert plan.chosen(artefact(name).needs)
    assert {ARTEFACTS[name].title for name in ALIASES.values()}
    with pytest.raises(UsageError, match="--only table9: there is ledger, table1"):
        artefact("table9")
    with pytest.raises(UsageError, match="no step is called nothing"):
        plan.chosen(["nothing"])


def test_every_step_serves_an_artefact():
    plan = PLANS["mini"]
    used = {
        step.name
        for name, recipe in ARTEFACTS.items()
        if name != "ledger"
        for step in plan.chosen(recipe.needs)
    }
    assert used == set(plan.steps)


class FakePlan:
    """Steps that write a word into a file; one of them fails until a file is there."""

    def __init__(self, folder: Path) -> None:
        self.results, self.checkpoints, self.folder = str(folder / "results"), "none", folder
        self.steps = {name: self.step(name) for name in ("one", "sub/two", "three")}

    def step(self, name: str, word: str = "") -> Step:
        out = self.folder / name.replace("/", "-")
        code = (
            f"import pathlib, sys; p = pathlib.Path({str(self.folder)!r}); "
            f"log = p / 'log'; log.write_text((log.read_text() if log.exists() else '') + "
            f"{name + ' '!r}); "
            f"sys.exit(3) if {name!r} == 'sub/two' and not (p / 'go').exists() else None; "
            f"pathlib.Path({str(out)!r}).write_text({word!r})"
        )
        return Step(name, (sys.executable, "-c", code), (str(out),))


def test_a_run_that_stopped_goes_on_where_it_was(tmp_path, capfd):
    plan = FakePlan(tmp_path)
    steps = list(plan.steps.values())
    with pytest.raises(UsageError, match="sub/two ended with status 3"):
        reproduce.run_all(plan, steps)
    assert (tmp_path / "log").read_text() == "one sub/two "
    (tmp_path / "go").touch()
    reproduce.run_all(plan, steps)
    assert (tmp_path / "log").read_text() == "one sub/two sub/two three "
    assert "3 steps, 1 of them done" in capfd.readouterr().out
    reproduce.run_all(plan, steps)
    assert (tmp_path / "log").read_text().endswith("three ")
    stamp = json.loads((tmp_path / "results" / "steps" / "sub.two.json").read_text())
    assert stamp["command"] == steps[1].line() and stamp["seconds"] >= 0 and stamp["commit"]
    (tmp_path / "three").unlink()  # what it wrote is gone: it is done no more
    reproduce.run_all(plan, steps)
    assert (tmp_path / "log").read_text().endswith("three three ")


def test_a_step_with_another_command_is_refused_and_nothing_is_lost(tmp_path):
    plan = FakePlan(tmp_path)
    (tmp_path / "go").touch()
    reproduce.run_all(plan, list(plan.steps.values()))
    changed = [plan.step("one", "other"), *list(plan.steps.values())[1:]]
    with pytest.raises(UsageError, match="give another --name"):
        reproduce.run_all(plan, changed)
    assert (tmp_path / "one").read_text() == ""


def test_a_step_that_leaves_nothing_is_an_error(tmp_path):
    plan = FakePlan(tmp_path)
    step = replace(plan.steps["one"], files=(str(tmp_path / "absent"),))
    with pytest.raises(UsageError, match=r"one left no .*absent, although it ended well"):
        reproduce.run_step(plan, step, "")


def test_plan_says_what_a_report_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, plan in PLANS.items():
        reproduce.write_plan(plan)
        read = RunPlan.read(Path(plan.results))
        assert read.seeds == plan.seeds and read.config in (
            "data/configs/mini.yaml",
            "data/configs/paper.yaml",
        )
        assert read.command == SCALES[plan.scale.name].command + (
            " --name reproduction-quick" if name == "quick" else ""
        )
        assert set(read.sweeps) == set(read.defaults)
        assert (ROOT / read.config).is_file() and (Path(plan.results) / PLAN).is_file()


def test_list_prints_commands_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--list", "--only", "theorem", "--seeds", "1"])
    out = capsys.readouterr().out
    assert out.startswith("# theorem\n") and "python -m eval.theorem --output_dir" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--only", "table9"], "--only table9"),
        (["--name", "../x"], "--name ../x"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([*words, "--list"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
