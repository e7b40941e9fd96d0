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
        # half in the miniature, to save time; all of the paper's 1,000 at its size
        assert swept.optim.total_steps * (2 if scale is MINI else 1) == main.optim.total_steps
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


class FakePlan(Plan):
    """Three steps, each after the one before, that note that they ran and write a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(MINI, "fake", 1)
        self.results, self.checkpoints = str(folder / "results"), str(folder / "checkpoints")
        self.folder = folder
        names = ("one", "sub/two", "three")
        self.steps = {
            name: self.step(name, needs=names[:place][-1:]) for place, name in enumerate(names)
        }

    def step(self, name: str, word: str = "", needs: tuple[str, ...] = ()) -> Step:
        out = Path(self.results) / name / "out"
        code = (
            f"import pathlib, sys; p = pathlib.Path({str(self.folder)!r}); out = pathlib.Path("
            f"{str(out)!r}); log = p / 'log'; "
            f"log.write_text((log.read_text() if log.exists() else '') + {name + ' '!r}); "
            f"sys.exit(3) if {name!r} == 'sub/two' and not (p / 'go').exists() else None; "
            f"out.parent.mkdir(parents=True, exist_ok=True); out.write_text({word!r})"
        )
        return Step(name, (sys.executable, "-c", code), (str(out),), needs)

    def ran(self) -> str:
        return (self.folder / "log").read_text()

    def run(self) -> None:
        reproduce.run_all(self, list(self.steps.values()))


@pytest.fixture
def fake(tmp_path) -> FakePlan:
    return FakePlan(tmp_path)


def test_a_run_that_stopped_goes_on_where_it_was(fake, tmp_path, capfd):
    with pytest.raises(UsageError, match="sub/two ended with status 3"):
        fake.run()
    assert fake.ran() == "one sub/two "
    (tmp_path / "go").touch()
    fake.run()
    assert fake.ran() == "one sub/two sub/two three "
    assert "3 steps, 1 of them done" in capfd.readouterr().out
    fake.run()
    assert fake.ran().endswith("sub/two three ")
    stamp = json.loads((tmp_path / "results" / "steps" / "sub.two.json").read_text())
    assert stamp["command"] == fake.steps["sub/two"].line()
    assert stamp["seconds"] >= 0 and stamp["commit"] and stamp["finished"] > 1.7e9
    (tmp_path / "results" / "three" / "out").unlink()  # what it wrote is gone: it is done no more
    fake.run()
    assert fake.ran().endswith("three three ")


def test_what_builds_on_a_step_that_runs_again_runs_again_from_nothing(fake, tmp_path):
    (tmp_path / "go").touch()
    fake.run()
    for name in ("one", "sub/two", "three"):
        (tmp_path / "results" / name / "old").touch()
    (tmp_path / "results" / "sub" / "two" / "out").unlink()
    fake.run()
    assert fake.ran() == "one sub/two three sub/two three "
    assert (tmp_path / "results" / "one" / "old").exists()
    assert (tmp_path / "results" / "sub" / "two" / "old").exists()  # it goes on with what it has
    assert not (tmp_path / "results" / "three" / "old").exists()
    # the same where the step before was run alone in between
    reproduce.run_all(fake, [replace(fake.steps["one"], files=())])
    assert [step.name for step, _ in reproduce.undone(fake, list(fake.steps.values()))] == []
    (tmp_path / "results" / "one" / "out").unlink()
    reproduce.run_all(fake, [fake.steps["one"]])
    found = reproduce.undone(fake, list(fake.steps.values()))
    assert [(step.name, stale) for step, stale in found] == [("sub/two", True), ("three", True)]


def test_data_that_is_drawn_again_changes_nothing_else(fake, tmp_path):
    (tmp_path / "go").touch()
    fake.steps["one"] = replace(fake.steps["one"], fresh=(str(tmp_path / "half"),))
    fake.run()
    (tmp_path / "results" / "one" / "out").unlink()
    fake.run()
    assert fake.ran() == "one sub/two three one "
    assert not [s.name for s in PLANS["mini"].steps.values() if s.fresh and s.needs]
    drawn = {s.name for s in PLANS["mini"].steps.values() if s.fresh}
    assert drawn == {f"seed{seed}/{name}" for seed in range(3) for name in ("data", "before")}


def test_a_folder_that_cannot_be_gone_on_with_is_removed_first(fake, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "drawn").touch()
    step = replace(fake.steps["one"], fresh=(str(half),))
    fake.steps["one"] = step
    reproduce.run_all(fake, [step])
    assert not half.exists()


def test_a_step_with_another_command_is_refused_and_nothing_is_lost(fake, tmp_path):
    (tmp_path / "go").touch()
    fake.run()
    plan = (tmp_path / "results" / PLAN).read_text()
    changed = [fake.step("one", "other"), *list(fake.steps.values())[1:]]
    fake.seeds = 2
    with pytest.raises(UsageError, match="give another --name"):
        reproduce.run_all(fake, changed)
    assert (tmp_path / "results" / "one" / "out").read_text() == ""
    assert (tmp_path / "results" / PLAN).read_text() == plan


def test_another_plan_in_the_same_folder_is_refused_and_seeds_are_not_forgotten(fake, tmp_path):
    (tmp_path / "go").touch()
    fake.seeds = 3
    fake.run()
    fake.seeds = 1
    fake.run()
    assert RunPlan.read(tmp_path / "results").seeds == 3
    fake.seeds = 4
    fake.run()
    assert RunPlan.read(tmp_path / "results").seeds == 4
    fake.scale = quick(MINI)
    with pytest.raises(UsageError, match="is of another plan, its steps, quick differ"):
        fake.run()
    assert not RunPlan.read(tmp_path / "results").quick


def test_two_runs_in_one_folder_do_not_meet(fake, tmp_path):
    (tmp_path / "go").touch()
    with reproduce.alone(fake), pytest.raises(UsageError, match="another run is at work there"):
        fake.run()
    assert not (tmp_path / "log").exists()
    with reproduce.alone(fake) as lock:  # a step that outlives its runner holds the lock
        child = subprocess.Popen(["sleep", "30"], pass_fds=(lock,))
    with pytest.raises(UsageError, match="or a step of one that was killed"):
        fake.run()
    child.kill()
    child.wait()
    fake.run()


def test_a_step_that_leaves_nothing_is_an_error(fake, tmp_path):
    step = replace(fake.steps["one"], files=(str(tmp_path / "absent"),))
    fake.steps["one"] = step
    with pytest.raises(UsageError, match=r"one left no .*absent, although it ended well"):
        reproduce.run_all(fake, [step])


def test_plan_says_what_a_report_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, plan in PLANS.items():
        (tmp_path / plan.results).mkdir(parents=True)
        reproduce.write_plan(plan)
        read = RunPlan.read(Path(plan.results))
        assert (read.seeds, read.steps, read.quick) == (
            plan.seeds,
            plan.scale.steps,
            name == "quick",
        )
        more = " --quick --seeds 2" if name == "quick" else ""
        assert read.command == SCALES[plan.scale.name].command + more
        assert read.own_questions == (name != "paper")
        assert set(read.sweeps) == set(read.defaults)
        assert (ROOT / read.config).is_file()
    other = Plan(MINI, "mine", 3).described()["command"]
    assert other == "bash scripts/reproduce_mini.sh --name mine"


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
        (["--report_only", "--seeds", "2"], "--report_only: the seeds are those of the plan"),
        (["--only", "table9"], "--only table9"),
        (["--name", "../x"], "--name ../x"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([*words, *([] if "--report_only" in words else ["--list"])])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
