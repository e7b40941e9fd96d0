"""Counted cost and floors of one OPSD sample at 7B, per stage: small, middle, large.

    python -m benchmarks.cost [--machines H200 H800]

Nothing is measured here; see `train.cost` for what is counted and `train.plan` for a whole run.
"""

import argparse
from collections.abc import Sequence

from train import cost
from train.cost import CASES, FULL_SIZE, MACHINES, Case, Machine, Work
from train.plan import table
from train.wire import gather_sweep

UNION = FULL_SIZE.llm.vocab_size // 8  # ids of the top-K entries of a chunk of rows, about
BATCHES = (1, 8, 16, 32)


def sample_stages(case: Case) -> dict[str, Work]:
    """Stage -> work for one sample; decoding is the whole completion, shared by its batch."""
    context = cost.length(case.prompt()) + case.completion / 2
    decoding = {
        f"decode, B={batch}": cost.decode_step(FULL_SIZE, batch, context)
        * (case.completion / batch)
        for batch in BATCHES
    }
    return {
        "ViT, student image": cost.vision(FULL_SIZE, [case.image]),
        "prefill": cost.prefill(FULL_SIZE, case),
        **decoding,
        "student, full recompute": cost.student(FULL_SIZE, case, "full", early_stop=False),
        "student, as torch recomputes": cost.student(FULL_SIZE, case, "full"),
        "student, no recompute": cost.student(FULL_SIZE, case),
        "teacher, ViT of all images": cost.teacher(FULL_SIZE, case),
        "head + JSD, full vocabulary": cost.loss_head(FULL_SIZE, case.rows),
        "head + JSD, union of top-K": cost.loss_head(FULL_SIZE, case.rows, UNION, UNION),
    }


def step_stages() -> dict[str, Work]:
    """What is done once per optimizer step, unsharded."""
    p = cost.parameters(FULL_SIZE)
    return {
        "AdamW, all": cost.adamw(p.everything),
        "AdamW, understanding": cost.adamw(p.understanding),
        "EMA, understanding": cost.ema(p.understanding),
    }


def lines(machines: Sequence[Machine]) -> list[str]:
    """The tables."""
    by_case = {name: sample_stages(case) for name, case in CASES.items()}
    header = [f"per sample ({'/'.join(CASES)})", "TF", *(f"{m.name} ms" for m in machines)]
    rows = []
    for stage in by_case["S"]:
        works = [stages[stage] for stages in by_case.values()]
        flops = "/".join(f"{work.flops / 1e12:.1f}" for work in works)
        rows.append([stage, flops, *("/".join(_ms(w, m) for w in works) for m in machines)])
    once = [[name, *(_ms(work, m) for m in machines)] for name, work in step_stages().items()]
    p = cost.parameters(FULL_SIZE)
    for name, count in (("all", p.everything), ("understanding", p.understanding)):
        received = gather_sweep(count, 8)
        times = [f"{1e3 * received / m.link:.0f}" for m in machines]
        once.append([f"gather in bf16 on 8 ranks, {name}", *times])
    return [
        table(header, rows),
        "",
        table(["per optimizer step", *(f"{m.name} ms" for m in machines)], once),
    ]


def _ms(work: Work, machine: Machine) -> str:
    milliseconds = 1e3 * work.seconds(machine)
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--machines", nargs="+", default=["H200", "H800"], choices=list(MACHINES), metavar="NAME",
        help=f"of {', '.join(MACHINES)}"
    )  # fmt: skip
    args = parser.parse_args(argv)
    print("\n".join(lines([MACHINES[name] for name in args.machines])))


if __name__ == "__main__":
    main()
