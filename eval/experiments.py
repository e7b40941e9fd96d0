"""The runs behind every table and figure: what is run, in which order, and what depends on what.

A scale says which model, data and budgets; the steps are the same at every scale. A step is one
command of this repository, named after the folder below results/NAME that it fills.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

from train.config import UsageError

LAUNCHERS = "scripts/visual_opsd"
PAIRS = (  # first:second of the paired tests
    "opsd:base", "opsd:sft", "opsd:sft_base", "opsd:noise", "opsd:thinkmorph", "noise:base",
    "noise:sft", "thinkmorph:base", "thinkmorph-noise:thinkmorph", "thinkmorph-none:thinkmorph",
)  # fmt: skip
FAMILIES = ("Visual_Search", "Spatial_Navigation", "Jigsaw_Assembly", "Chart_Refocus")
STUDENTS = ("opsd", "noise", "sft", "sft_base")
ENDS = {("jsd_beta", "0"), ("jsd_beta", "1")}
CONTROLS = ("noise", "shuffled", "blank", "problem", "crop")


@dataclass(frozen=True)
class Scale:
    """Models, data and budgets of a reproduction.

    title: of the report. command: runs all steps. config: the settings of the trainers. base: the
    model that draws (ThinkMorph). before: the one that it was made from (BAGEL), where
    text-only SFT starts; "" makes one of random weights for each seed. data: folder of the
    training data sets, with `{name}` and `{seed}` replaced; drawn: whether they are drawn there.
    split: of those sets, for what needs true visual thoughts. limit: rows of each benchmark, 0 for
    all. steps, sft_steps, sweep_steps: updates of OPSD, of SFT from `before` (SFT from the base has
    as many as OPSD), and of the runs of a sweep. defaults: knob -> the value of the main run.
    sweeps: knob -> other values. flags: of every trainer. timed, rows: of each task, for seconds
    and for attention. shown_limit: like limit, of the sets in `shown`. validates: whether there are
    validation rows. spread: whether questions are shared out over GPUs. quick: the numbers mean
    nothing.
    """

    name: str
    title: str
    command: str
    config: str
    base: str
    before: str
    data: str
    drawn: bool
    sources: str
    sft_sources: str
    split: str
    shown: tuple[str, ...]
    benchmarks: tuple[str, ...]
    protocol: str
    device: str
    kl_samples: int
    kl_batch: int
    new_tokens: int
    limit: int
    steps: int
    sft_steps: int
    sweep_steps: int
    defaults: Mapping[str, str]
    sweeps: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...] = ()
    timed: int = 5
    rows: int = 50
    shown_limit: int = 0
    validates: bool = True
    spread: bool = False
    quick: bool = False


MINI = Scale(
    name="mini",
    title="every table and figure, on the miniature",
    command="bash scripts/reproduce_mini.sh",
    config="data/configs/mini.yaml",
    base="models/mini-base",
    before="",
    data="datasets/{name}-seed{seed}",
    drawn=True,
    sources="data/configs/mini_opsd.yaml",
    sft_sources="data/configs/mini_sft.yaml",
    split="test",
    shown=("mini",),
    benchmarks=("mini",),
    protocol="mini",
    device="cpu",
    kl_samples=400,
    kl_batch=50,
    new_tokens=24,
    limit=0,
    steps=350,
    sft_steps=700,  # the paper's SFT has twice the updates of its OPSD
    sweep_steps=175,
    defaults={
        "jsd_top_k": "64", "jsd_token_clip": "0", "jsd_beta": "0.1", "teacher_mode": "ema",
        "ema_decay": "0.998",
    },
    sweeps={  # of a vocabulary of 441
        "jsd_top_k": ("4", "16", "0"),
        "jsd_token_clip": ("0.01", "0.05", "0.1"),
        "jsd_beta": ("0", "0.5", "1"),
        "teacher_mode": ("self", "fixed"),
        "ema_decay": ("0.98", "0.995", "0.9995"),
    },
    flags=("--preset", "data/configs/mini.yaml"),
)  # fmt: skip

PAPER = Scale(
    name="paper",
    title="every table and figure, at 7B",
    command="python -m eval.reproduce --scale paper",
    config="data/configs/paper.yaml",
    base="models/ThinkMorph-7B",
    before="models/BAGEL-7B-MoT",
    data="datasets",
    drawn=False,
    sources="data/configs/visual_opsd.yaml",
    sft_sources="data/configs/text_reasoning.yaml",
    split="train",  # the released sets have no other
    shown=FAMILIES,
    benchmarks=("paper",),
    protocol="paper",
    device="auto",
    kl_samples=1000,
    kl_batch=1,
    new_tokens=1024,
    limit=0,
    steps=1000,
    sft_steps=2000,
    sweep_steps=1000,
    defaults={
        "jsd_top_k": "256", "jsd_token_clip": "0.05", "jsd_beta": "0.5", "teacher_mode": "ema",
        "ema_decay": "0.995",
    },
    sweeps={
        "jsd_top_k": ("64", "128", "512"),
        "jsd_token_clip": ("0", "0.01", "0.1"),
        "jsd_beta": ("0", "0.3", "0.7", "1"),
        "teacher_mode": ("self", "fixed"),
        "ema_decay": ("0.98", "0.99", "0.999"),
    },
    flags=("--keep_last", "1"),
    rows=25,
    shown_limit=250,
    validates=False,
    spread=True,
)  # fmt: skip

SCALES = {scale.name: scale for scale in (MINI, PAPER)}
SEEDS = 3  # the paper's three runs
DEFAULT_NAMES = {"mini": "reproduction", "paper": "reproduction-paper"}


def quick(scale: Scale) -> Scale:
    """A few updates and rows of everything: shows that it runs, its numbers mean nothing."""
    few = {"kl_samples": 8, "kl_batch": 4, "limit": 4, "shown_limit": 4, "timed": 1, "rows": 2}
    steps = {"steps": 2, "sft_steps": 2, "sweep_steps": 2}
    flags = (*scale.flags, "--warmup_steps", "1", "--validation_samples", "2")
    flags = flags if scale.validates else (*scale.flags, "--warmup_steps", "1")
    return replace(scale, **few, **steps, flags=flags, quick=True)


@dataclass(frozen=True)
class Step:
    """One command.

    files: what has to be there when it is done, from the root of the repository. needs: steps that
    come first. fresh: folders that the command draws from its seed and cannot go on with: they
    are removed before it runs.
    """

    name: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()

    def line(self) -> str:
        """As it is typed in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


class Plan:
    """All steps of a scale, each after what it needs."""

    def __init__(self, scale: Scale, name: str, seeds: int) -> None:
        self.scale, self.name, self.seeds = scale, name, seeds
        self.results, self.checkpoints = f"results/{name}", f"checkpoints/{name}"
        steps = [step for seed in range(seeds) for step in self._of_seed(seed)]
        steps += [*self._sweep(), *self._once()]
        self.steps = {step.name: step for step in steps}

    def described(self) -> dict[str, Any]:
        """What a report has to know of the plan: the fields of `eval.artefacts.runs.RunPlan`."""
        scale = self.scale
        default = DEFAULT_NAMES[scale.name] + ("-quick" if scale.quick else "")
        flags = " --quick" if scale.quick else ""
        flags += "" if self.name == default else f" --name {self.name}"
        flags += "" if self.seeds == SEEDS else f" --seeds {self.seeds}"
        return {
            "title": scale.title,
            "command": f"{scale.command}{flags}",
            "config": scale.config,
            "seeds": self.seeds,
            "steps": scale.steps,
            "quick": scale.quick,
            "own_questions": scale.drawn,
            "defaults": dict(scale.defaults),
            "sweeps": {knob: list(values) for knob, values in scale.sweeps.items()},
        }

    def chosen(self, patterns: Sequence[str]) -> list[Step]:
        """The steps whose names fit a pattern, and what they need, in the order of the plan.

        Raises:
            UsageError: a pattern fits none.
        """
        wanted: set[str] = set()
        for pattern in patterns:
            found = [name for name in self.steps if fnmatch(name, pattern)]
            if not found:
                raise UsageError(f"no step is called {pattern}: see --list")
            wanted.update(found)
        for step in reversed(self.steps.values()):  # what needs comes after what is needed
            if step.name in wanted:
                wanted.update(step.needs)
        return [step for step in self.steps.values() if step.name in wanted]

    # ---- of every seed ---------------------------------------------------------------------------

    def _of_seed(self, seed: int) -> Iterator[Step]:
        scale, at = self.scale, f"seed{seed}"
        ready: tuple[str, ...] = ()
        if scale.drawn:
            data = self._data(seed)
            ready = (f"{at}/data",)
            command = ("python", "-m", "data.miniworld", "--output", data, "--seed", str(seed))
            families = tuple(f"{data}/{family}" for family in FAMILIES)
            yield Step(f"{at}/data", command, families, fresh=(data,))
        before, made = scale.before, ()
        if not before:
            before, made = f"{self.checkpoints}/{at}/before", (f"{at}/before",)
            command = ("python", "-m", "data.miniworld.model", "--output", before)
            files = (f"{before}/model.safetensors",)
            yield Step(f"{at}/before", (*command, "--seed", str(seed)), files, fresh=(before,))
        base, steps = scale.base, scale.steps
        yield self._train(f"{at}/opsd", "run_visual_opsd.sh", base, seed, steps, ready)
        yield self._train(f"{at}/noise", "run_visual_opsd_noise.sh", base, seed, steps, ready)
        launcher, needs = "run_sft_baseline.sh", (*ready, *made)
        yield self._train(f"{at}/sft", launcher, before, seed, scale.sft_steps, needs)
        yield self._train(f"{at}/sft_base", launcher, base, seed, steps, ready)
        trained = tuple(f"{at}/{student}" for student in STUDENTS)
        students = [f"{name}={self._latest(f'{at}/{name}')}" for name in STUDENTS]
        for name, more in (("kl", ()), ("kl_own", ("--completion", "sample"))):
            yield self._diagnose(f"{at}/{name}", seed, students, trained, more)
        systems = [
            f"base:thinkmorph-text={base}", f"bagel={before}", f"thinkmorph={base}",
            f"thinkmorph-noise={base}", f"thinkmorph-none={base}",
            *(f"{name}:{name.split('_')[0]}={self._latest(f'{at}/{name}')}" for name in STUDENTS),
        ]  # fmt: skip
        yield self._ask(f"{at}/systems", seed, systems, scale.benchmarks, (*trained, *made))
        controls = [f"base:thinkmorph-text={base}", f"thinkmorph-shuffled={base}"]
        controls += [f"{context}={base}" for context in ("teacher", "prompts-only")]
        controls += [f"teacher-{name}={base}" for name in CONTROLS]
        yield self._ask(f"{at}/controls", seed, controls, scale.shown, ready)
        pairs = f"{self.results}/{at}/pairs.json"
        yield Step(
            f"{at}/pairs",
            ("python", "-m", "eval.pairs", f"{self.results}/{at}/systems", "--pairs", *PAIRS)
            + ("--output_file", pairs),
            (pairs,),
            (f"{at}/systems",),
        )
        folder = f"{self.results}/{at}/kl"
        command = ("python", "-m", "eval.token_classes", folder, "--model_path", base)
        yield Step(f"{at}/token_classes", command, (f"{folder}/tokens.json",), (f"{at}/kl",))

    # ---- with the first seed alone ---------------------------------------------------------------

    def _sweep(self) -> Iterator[Step]:
        scale = self.scale
        runs = {"default": ()}
        for knob, values in scale.sweeps.items():
            for value in values:
                # a clipped divergence may be negative at the ends of beta
                ends = ("--jsd_token_clip", "0") if (knob, value) in ENDS else ()
                runs[f"{knob}-{value}"] = (f"--{knob}", value, *ends)
        needs = ("seed0/data",) if scale.drawn else ()
        launcher, steps = "run_visual_opsd.sh", scale.sweep_steps
        for name, flags in runs.items():
            yield self._train(f"sweep/{name}", launcher, scale.base, 0, steps, needs, flags)
        trained = tuple(f"sweep/{name}" for name in runs)
        students = [f"{name}={self._latest(f'sweep/{name}')}" for name in runs]
        yield self._diagnose("sweep/kl", 0, students, trained)
        systems = [f"{name}:opsd={self._latest(f'sweep/{name}')}" for name in runs]
        yield self._ask("sweep/systems", 0, systems, scale.benchmarks, trained)

    def _once(self) -> Iterator[Step]:
        scale, results = self.scale, self.results
        base, device = ("--model_path", scale.base), ("--device", scale.device)
        distilled = self._latest("seed0/opsd")
        student = ("--student_path", distilled)
        rows = ("--dataset_config_file", scale.sources, "--split", scale.split)
        ready = ("seed0/data",) if scale.drawn else ()
        trained = (*ready, "seed0/opsd")
        budget = ("--max_new_tokens", str(scale.new_tokens))

        def step(
            name: str, module: str, flags: Sequence[str], file: str, needs: tuple[str, ...]
        ) -> Step:
            command = ("python", "-m", module, *flags, "--output_dir", f"{results}/{name}")
            files = (f"{results}/{name}/{file}",)
            return Step(name, command, files, needs, self._environment(0))

        few = ("--limit_per_task", str(scale.rows))
        yield step(
            "attention", "eval.attention", (*base, *student, *rows, *device, *few, *budget),
            "attention.json", trained,
        )  # fmt: skip
        timed = ("--limit_per_task", str(scale.timed), "--latency_samples", str(scale.timed))
        timed_students = [f"{name}={self._latest(f'seed0/{name}')}" for name in ("sft", "noise")]
        both = (student[0], *timed_students, f"opsd={distilled}")
        yield step(
            "latency", "eval.interleaved", (*base, *both, *rows, *device, *timed, *budget),
            "table.json", (*trained, "seed0/sft", "seed0/noise"),
        )  # fmt: skip
        shown = ("--jsd_top_k", scale.defaults["jsd_top_k"])
        # the paper's clip, also where the run has none: the page shows what it would cut
        shown += ("--jsd_token_clip", "0.05", "--jsd_beta", scale.defaults["jsd_beta"])
        flags = (*base, *rows, *device, *shown)
        yield step("microscope", "eval.microscope", flags, "microscope.json", ready)
        flags = (*flags, *student, "--completion", "greedy", *budget)
        yield step("microscope_opsd", "eval.microscope", flags, "microscope.json", trained)
        flags = (f"{results}/seed0/systems", "--first", "thinkmorph", "--second", "opsd", *device)
        yield step("cases", "eval.cases", flags, "cases.json", ("seed0/systems",))
        yield step("theorem", "eval.theorem", (), "theorem.json", ())

    # ---- kinds of commands -----------------------------------------------------------------------

    def _train(
        self,
        name: str,
        launcher: str,
        start: str,
        seed: int,
        steps: int,
        needs: tuple[str, ...],
        more: tuple[str, ...] = (),
    ) -> Step:
        sft = launcher == "run_sft_baseline.sh"
        flags = self.scale.flags
        if sft and "--validation_samples" in flags:  # a flag of OPSD alone
            flags = flags[: flags.index("--validation_samples")]
        sources = self.scale.sft_sources if sft else self.scale.sources
        command = ("bash", f"{LAUNCHERS}/{launcher}", start, *flags)
        command += ("--dataset_config_file", sources, "--total_steps", str(steps))
        command += ("--global_seed", str(seed), "--data_seed", str(seed), "--resume", "auto", *more)
        environment = self._environment(seed) | {"OUTPUT_NAME": f"{self.name}/{name}"}
        files = [f"{self._latest(name)}/run.json"]
        if self.scale.validates and not sft:
            files.append(f"{self.results}/{name}/validation.jsonl")
        return Step(name, command, tuple(files), needs, environment)

    def _diagnose(
        self,
        name: str,
        seed: int,
        students: Sequence[str],
        needs: tuple[str, ...],
        more: tuple[str, ...] = (),
    ) -> Step:
        scale, folder = self.scale, f"{self.results}/{name}"
        command = ("bash", f"{LAUNCHERS}/run_kl_diagnostic.sh", scale.base, str(scale.kl_samples))
        command += (folder, "--dataset_config_file", scale.sources, "--split", scale.split)
        command += ("--batch_size", str(scale.kl_batch), "--seed", str(seed))
        command += ("--device", scale.device, "--max_new_tokens", str(scale.new_tokens), *more)
        command += ("--student_path", *students)
        files = (f"{folder}/summary.json", f"{folder}/records.jsonl")
        return Step(name, command, files, needs, self._environment(seed))

    def _ask(
        self,
        name: str,
        seed: int,
        systems: Sequence[str],
        benchmarks: Sequence[str],
        needs: tuple[str, ...],
    ) -> Step:
        scale, folder = self.scale, f"{self.results}/{name}"
        asks = (
            ("bash", f"{LAUNCHERS}/run_eval.sh") if scale.spread else ("python", "-m", "eval.run")
        )
        command = (*asks, "--systems", *systems, "--benchmarks", *benchmarks)
        command += ("--protocol", scale.protocol, "--split", scale.split, "--seed", str(seed))
        command += ("--device", scale.device, "--output_dir", folder)
        limit = scale.shown_limit if tuple(benchmarks) == scale.shown else scale.limit
        if limit:
            command += ("--limit", str(limit))
        names = [system.partition("=")[0].partition(":")[0] for system in systems]
        files = (f"{folder}/table.json", *(f"{folder}/{name}/scores.json" for name in names))
        return Step(name, command, files, needs, self._environment(seed))

    def _data(self, seed: int) -> str:
        return self.scale.data.format(name=self.name, seed=seed)

    def _latest(self, name: str) -> str:
        return f"{self.checkpoints}/{name}/latest"

    def _environment(self, seed: int) -> dict[str, str]:
        return {"VISUAL_OPSD_DATA_ROOT": self._data(seed)}
