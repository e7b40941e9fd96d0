"""Every table and figure of the paper, from runs to report, by one command that can be interrupted.

    python -m eval.reproduce                        # the miniature, 60 to 90 minutes on two cores
    python -m eval.reproduce --only table5 figure5  # what these need, and a report of all there is
    python -m eval.reproduce --scale paper --list   # the same steps at 7B

Steps that are done are kept: each leaves a file in results/NAME/steps with its command, commit and
seconds. A step that was interrupted is run again, and trainers and evaluations go on where they
were. At the end, and with --report_only at once, the report is made of what is there.
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from eval.artefacts.catalogue import ARTEFACTS, artefact
from eval.artefacts.runs import PLAN
from eval.experiments import DEFAULT_NAMES, SCALES, SEEDS, Plan, Step, quick
from eval.report import report
from eval.session import plain_parser, positive
from train.config import UsageError
from train.records import git_commit, write_atomic
from train.session import exit_on_user_error

LOCK = ".lock"
STEPS = "steps"  # folder of the files that say what is done


def stamp(plan: Plan, step: Step) -> Path:
    return Path(plan.results) / STEPS / f"{step.name.replace('/', '.')}.json"


def is_done(plan: Plan, step: Step) -> bool:
    """Whether a step was run to its end and what it wrote is there.

    Raises:
        UsageError: it was run, with another command.
    """
    file = stamp(plan, step)
    if not file.is_file():
        return False
    before = json.loads(file.read_text())["command"]
    if before != step.line():
        raise UsageError(
            f"{file}: the step was run as `{before}` and would now be `{step.line()}`: give "
            f"another --name, or remove {plan.results} and {plan.checkpoints}"
        )
    return all(Path(name).exists() for name in step.files)


def finished(plan: Plan, name: str) -> float | None:
    """When a step ended, in seconds since 1970; None if it did not."""
    file = stamp(plan, plan.steps[name])
    return json.loads(file.read_text()).get("finished") if file.is_file() else None


def undone(plan: Plan, steps: Sequence[Step]) -> list[tuple[Step, bool]]:
    """The steps to run, and whether what they left has to go first: a step on which they build was
    run again after them, or will be. What is drawn from a seed is the same when it is drawn again.
    """
    missing: dict[str, bool] = {}
    for step in steps:
        there, ended = is_done(plan, step), finished(plan, step.name)
        needs = [name for name in step.needs if not plan.steps[name].fresh]
        above = [finished(plan, name) or 0.0 for name in needs]
        stale = ended is not None and (
            max(above, default=0.0) > ended or any(name in missing for name in needs)
        )
        if stale or not there:
            missing[step.name] = stale
    return [(step, missing[step.name]) for step in steps if step.name in missing]


def run_step(plan: Plan, step: Step, title: str, lock: int) -> float:
    """Run one command, with its output on the terminal, and note that it is done; its seconds.

    Args:
        lock: open file that the command keeps open: while any part of it lives, nobody else begins.

    Raises:
        UsageError: it failed; the message names it.
    """
    print(f"\n== {title}\n{step.line()}", flush=True)
    for folder in step.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    environment = {**os.environ, **step.environment}
    done = subprocess.run(step.command, env=environment, check=False, pass_fds=(lock,))
    seconds = time.monotonic() - start
    if done.returncode:
        raise UsageError(
            f"{step.name} ended with status {done.returncode}; its own message is above. The same "
            "command goes on from here"
        )
    if absent := [name for name in step.files if not Path(name).exists()]:
        raise UsageError(f"{step.name} left no {absent[0]}, although it ended well")
    content = {"command": step.line(), "seconds": round(seconds, 1), "commit": git_commit()}
    content["finished"] = time.time()
    write_atomic(stamp(plan, step), json.dumps(content, indent=1) + "\n")
    return seconds


def write_plan(plan: Plan) -> None:
    """Note what is to be run, for the report. More seeds than asked for stay in the plan.

    Raises:
        UsageError: the folder holds the results of another plan.
    """
    file, wanted = Path(plan.results) / PLAN, plan.described()
    if file.is_file():
        before = json.loads(file.read_text())
        same = ("title", "config", "steps", "quick", "defaults", "sweeps")
        if other := [name for name in same if before.get(name) != wanted[name]]:
            raise UsageError(
                f"{file} is of another plan, its {', '.join(other)} differ: give another --name"
            )
        if before["seeds"] > wanted["seeds"]:
            return
    write_atomic(file, json.dumps(wanted, indent=1) + "\n")


@contextmanager
def alone(plan: Plan) -> Iterator[int]:
    """Hold the lock of a results folder; gives its open file.

    Raises:
        UsageError: somebody else has it.
    """
    Path(plan.results).mkdir(parents=True, exist_ok=True)
    with (Path(plan.results) / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{plan.results}: another run is at work there, or a step of one that was killed; "
                "wait for it or end it, or give another --name"
            ) from error
        yield file.fileno()


def run_all(plan: Plan, steps: Sequence[Step]) -> None:
    """Run what is not done, in order, and say how far it is."""
    with alone(plan) as lock:
        missing = undone(plan, steps)
        write_plan(plan)
        print(f"{len(steps)} steps, {len(steps) - len(missing)} of them done", flush=True)
        start = time.monotonic()
        for number, (step, stale) in enumerate(missing, len(steps) - len(missing) + 1):
            if stale:
                shutil.rmtree(Path(plan.results) / step.name, ignore_errors=True)
            title = f"{number}/{len(steps)} {step.name}  ({clock(time.monotonic() - start)})"
            print(f"-- {step.name}: {clock(run_step(plan, step, title, lock))}", flush=True)
        if missing:
            print(f"\n{len(missing)} steps in {clock(time.monotonic() - start)}", flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the flags ask for."""
    scale, seeds = SCALES[args.scale], args.seeds or SEEDS
    name = args.name or DEFAULT_NAMES[scale.name] + ("-quick" if args.quick else "")
    if args.quick:
        scale = quick(scale)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UsageError(f"--name {name} is a folder below results/ and checkpoints/")
    return Plan(scale, name, seeds)


def steps_of(args: argparse.Namespace, plan: Plan) -> list[Step]:
    """All steps, or what the artefacts of --only need."""
    if not args.only:
        return list(plan.steps.values())
    patterns = [pattern for name in args.only for pattern in artefact(name).needs]
    return plan.chosen(patterns) if patterns else []


def show(plan: Plan, steps: Sequence[Step]) -> None:
    """Print the commands, with a mark at what is done."""
    for step in steps:
        print(f"# {step.name}{' (done)' if is_done(plan, step) else ''}\n{step.line()}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = plain_parser("eval.reproduce", "Every table and figure, from runs to report.")
    add = parser.add_argument
    add("--scale", choices=tuple(SCALES), default="mini", help="the miniature, or the paper's size")
    add("--only", nargs="+", default=[], metavar="ARTEFACT", help=f"of {', '.join(ARTEFACTS)}")
    add("--seeds", type=int, help=f"seeds 0 to N - 1, each with runs of its own; default {SEEDS}")
    add("--name", help="folder below results/ and checkpoints/; default: reproduction")
    add("--quick", action="store_true", help="a few updates and rows of everything, in minutes")
    add("--list", action="store_true", help="print the commands and stop")
    add("--report_only", action="store_true", help="run nothing, make the report of what is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on_user_error():
        positive(seeds=args.seeds)
        plan = plan_of(args)
        steps = steps_of(args, plan)
        if args.list:
            show(plan, steps)
            return
        if args.report_only and args.seeds:
            raise UsageError("--report_only: the seeds are those of the plan; leave --seeds out")
        if not args.report_only:
            run_all(plan, steps)
        page = report(Path(plan.results))
        print(f"\nsaved {page}: open it in a browser")


if __name__ == "__main__":
    main()
