"""The collapse sentinel: notices a run that goes wrong, and does what --sentinel says.

It looks at what is logged anyway: at every metric line, and at every validation. Each look has a
light, of the signals that this kind of look can see:

    green  0    nothing is beyond its limit
    yellow 1    a signal is, for the first time in a row; one look may be chance
    red    2    a signal is in two consecutive looks of its kind, and the policy acts

A gap (k_gen, val/k_gen) that is beyond its limit, but lower than at the look before, stays where it
was: the run is on its way back, and ending it would cost what it still learns.

    warn                  says so
    lower_lr              also multiplies the learning rate by 0.1 from the next update on, at most
                          twice, and begins to count anew
    stop_and_keep_best    also ends the run with a checkpoint; `best` is what validation kept

All ranks see the same numbers, so all decide alike without asking each other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from train.metrics import say

Policy = Literal["off", "warn", "lower_lr", "stop_and_keep_best"]
GREEN, YELLOW, RED = 0, 1, 2

# Of the base's on the probe set, and of the first report's on the completions. Above 1 training has
# added to the gap; a half more allows for the overshoot at the peak of the learning rate. A sound
# run may be beyond it for most of its length, but then the gap falls from look to look.
K_GEN_RATIO = 1.5
# Below the best so far: twice the standard error of a difference on 200 rows, the default of four
# sources.
ACCURACY_DROP = 0.10
# Of the first report: texts that lose or repeat half of themselves are of another kind.
LENGTH_RATIOS = (0.5, 2.0)
# Above the first report, as shares. Miniature runs that did not collapse stay within 0.02.
BUDGET_RISE = 0.20  # a fifth of the completions no longer ends itself
EMPTY_RISE = 0.10  # they have been sampled three times over
OUTSIDE_RISE = 0.05  # probability where the loss does not see it
# A mean over fewer completions doubles by chance: their lengths, and more so their gaps, spread as
# widely as they are large, and how widely is not in a metric line.
FEW = 64
SHARE_ERRORS, RATIO_ERRORS = 3.0, 4.0  # standard errors that chance is given
LR_CUT, MOST_CUTS = 0.1, 2  # a hundredth of the learning rate and still red: it is not the rate


@dataclass(frozen=True)
class Signal:
    """Something beyond its limit. value and limit: as they are shown.

    eases: it is a gap, and lower than at the look before.
    """

    name: str
    value: str
    limit: str
    remedy: str
    eases: bool = False


@dataclass(frozen=True)
class State:
    """What a resumed run needs, as json has it.

    first: the first report. before: the last one's gap. reported: the update of the last one.
    counts: signal -> looks in a row that saw it. cuts: of the learning rate. stopped: why the
    sentinel ended the run.
    """

    first: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    reported: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    stopped: str | None = None


@dataclass(frozen=True)
class Setting:
    """What a run tells its sentinel.

    global_batch: rows of an update. announce: this rank says what there is to say.
    """

    policy: Policy
    total_steps: int
    global_batch: int
    announce: bool


class Sentinel:
    """Counts signals over the looks of one run."""

    def __init__(self, setting: Setting, state: State | None = None) -> None:
        self.setting, self.state = setting, state or State()

    @property
    def stopped(self) -> str | None:
        """Why the run is to end now; None while it goes on."""
        return self.state.stopped

    @property
    def lr_factor(self) -> float:
        """What the learning rate of the coming update is multiplied with."""
        return LR_CUT**self.state.cuts

    def progress(self) -> dict[str, Any]:
        """The state for `restored`."""
        return asdict(self.state)

    def line(self, line: Mapping[str, float]) -> dict[str, float]:
        """Look at a metric line; what to add to it. The first one is what others are held to, or
        the first that is not of few completions.
        """
        step = int(line["step"])
        line = sized(line, (step - self.state.reported) * self.setting.global_batch)
        first = self.state.first
        if not first or first["completions"] < FEW <= line["completions"]:
            first = {name: line[name] for name in KEPT if name in line}
        signals = list(of_line(line, first, self.state.before))
        before = {name: line[name] for name in ("k_gen",) if name in line}
        self.state = replace(self.state, first=first, before=before, reported=step)
        return self._look(step, LINE_SIGNALS, signals)

    def validation(
        self, step: int, history: Sequence[Mapping[str, float]], now: Mapping[str, float]
    ) -> dict[str, float]:
        """Look at a validation; what to add to its metric line.

        history: overall scores of the validations before it, the base's first.
        """
        return self._look(step, PROBE_SIGNALS, of_validation(history, now))

    def _look(self, step: int, kind: Sequence[str], signals: Iterable[Signal]) -> dict[str, float]:
        """Count what was seen among the signals of this kind; those of the other keep theirs."""
        if self.setting.policy == "off":
            return {}
        seen = {signal.name: signal for signal in signals}
        before = {name: self.state.counts.get(name, 0) for name in seen}
        counts = {name: max(YELLOW, before[name] + (not s.eases)) for name, s in seen.items()}
        others = {name: n for name, n in self.state.counts.items() if name not in kind}
        self.state = replace(self.state, counts=others | counts)
        counted = [signal for name, signal in seen.items() if counts[name] > before[name]]
        for signal in counted:
            if counts[signal.name] <= RED:  # once each
                self._say(step, "yellow" if counts[signal.name] == YELLOW else "red", signal)
        light = min(max(counts.values(), default=GREEN), RED)
        fresh = [signal for signal in counted if counts[signal.name] >= RED]
        if fresh and step < self.setting.total_steps:
            self._act(step, fresh[0])
        return {"sentinel": float(light)}

    def _act(self, step: int, signal: Signal) -> None:
        """What the policy does about a red light."""
        policy = self.setting.policy
        if policy == "stop_and_keep_best":
            reason = f"{signal.name} {signal.value} is {signal.limit}"
            self.state = replace(self.state, stopped=reason)
        elif policy == "lower_lr" and self.state.cuts < MOST_CUTS:
            self.state = replace(self.state, cuts=self.state.cuts + 1, counts={})
            if self.setting.announce:
                cuts = f"cut {self.state.cuts} of at most {MOST_CUTS}"
                say(
                    f"sentinel: after {step} updates the learning rate is multiplied by "
                    f"{self.lr_factor:g} ({cuts})"
                )

    def _say(self, step: int, light: str, signal: Signal) -> None:
        if self.setting.announce:
            say(
                f"sentinel {light} after {step} updates: {signal.name} {signal.value} is "
                f"{signal.limit}; {signal.remedy}"
            )


def restored(setting: Setting, progress: Mapping[str, Any]) -> Sentinel:
    """The sentinel of a run that goes on; `progress` is empty where there was none before.

    One that is no longer to stop the run lets go of having stopped it. Of an earlier version, whose
    first report has no size, what ended the run and the cuts stay; the next report is the first.
    """
    state = State(**progress)
    if "rows" not in state.first:
        state = replace(state, first={}, counts={})
    if setting.policy != "stop_and_keep_best" and state.stopped:
        state = replace(state, stopped=None, counts={})
    return Sentinel(setting, state)


def of_validation(
    history: Sequence[Mapping[str, float]], now: Mapping[str, float]
) -> Iterator[Signal]:
    """Signals of the probe set."""
    if not history:
        return
    limit = K_GEN_RATIO * history[0]["k_gen"]
    if now["k_gen"] > limit:
        yield Signal(
            "val/k_gen",
            f"{now['k_gen']:.4f}",
            f"above {limit:.4f}, {K_GEN_RATIO:g} times the base's",
            f"the student moves away from what the visual thoughts show: {SMALLER_GAP}",
            now["k_gen"] < history[-1]["k_gen"],
        )
    best = max(scores["accuracy"] for scores in history)
    # on fewer rows by chance as well; on the same rows every time, so by less chance than that
    drop = max(ACCURACY_DROP, 2 * math.sqrt(0.5 / now["n"]))
    if best - now["accuracy"] > drop + 1e-9:  # ten points exactly are not more
        yield Signal(
            "val/accuracy",
            f"{now['accuracy']:.1%}",
            f"more than {100 * drop:.3g} points below {best:.1%}, the best so far",
            "go back to `best`; try a slower teacher (a higher --ema_decay), a lower --lr or fewer "
            "--total_steps",
        )


def sized(line: Mapping[str, float], rows: int) -> dict[str, float]:
    """A metric line with how many rows and completions it is about, of the `rows` of its updates.

    The others have no visual thoughts, do not fit, or have an empty completion.
    """
    used = rows * (1 - line.get("undrawn", 0.0))
    lost = line.get("over_cap", 0.0) + line.get("empty_completions", 0.0)
    return {**line, "rows": max(1, round(used)), "completions": max(1, round(used * (1 - lost)))}


def of_line(
    line: Mapping[str, float], first: Mapping[str, float], before: Mapping[str, float]
) -> Iterator[Signal]:
    """Signals of the on-policy completions, from lines of `sized`; what a line lacks (see
    --jsd_loss_kind) is none.

    Means over few completions are passed over. A share of few is given three standard errors of the
    difference of two shares, at most; a gap four of the ratio of two means.
    """
    few = min(line["completions"], first["completions"]) < FEW
    if not few:
        yield from _of_means(line, first, before)
    for name, (least, remedy) in RISES.items():
        rise = least
        if name in SIZE_OF_SHARE:
            rise = max(least, SHARE_ERRORS * 0.5 * _errors(line, first, SIZE_OF_SHARE[name]))
        elif few:
            continue
        if name in line and name in first and line[name] > first[name] + rise:
            limit = f"more than {rise:.2g} above {first[name]:.3f}, the first report"
            yield Signal(name, f"{line[name]:.3f}", limit, remedy)


def _errors(line: Mapping[str, float], first: Mapping[str, float], size: str) -> float:
    """Standard error of the difference of two means, of values whose deviation is 1."""
    return math.sqrt(1 / line[size] + 1 / first[size])


def _of_means(
    line: Mapping[str, float], first: Mapping[str, float], before: Mapping[str, float]
) -> Iterator[Signal]:
    """Of the lengths, and of the gap to the current teacher on what the student writes now."""
    if "completion_length" in line and "completion_length" in first:
        length = line["completion_length"]
        low, high = (ratio * first["completion_length"] for ratio in LENGTH_RATIOS)
        if not low <= length <= high:
            yield Signal(
                "completion_length",
                f"{length:.1f}",
                f"outside {low:.1f} to {high:.1f}, half and twice the first report",
                "look at what the student writes; try a lower --lr",
            )
    if "k_gen" in line and "k_gen" in first:
        ratio = max(K_GEN_RATIO, 1 + RATIO_ERRORS * _errors(line, first, "completions"))
        limit = ratio * first["k_gen"]
        if line["k_gen"] > limit:
            yield Signal(
                "k_gen",
                f"{line['k_gen']:.4f}",
                f"above {limit:.4f}, {ratio:.3g} times the first report",
                f"the student moves away from its teacher: {SMALLER_GAP}",
                line["k_gen"] < before.get("k_gen", 0.0),
            )


SMALLER_GAP = "try a lower --lr, a higher --jsd_token_clip or none (0), or a --jsd_beta nearer 0"
RISES = {  # metric -> how far above the first report it may be, and what helps
    "ended_by_budget": (
        BUDGET_RISE,
        "the student no longer ends its texts: try a lower --lr, or a higher "
        "--sample_max_new_tokens if they are long for a reason",
    ),
    "empty_completions": (
        EMPTY_RISE,
        "the student ends its texts at once: try a lower --lr or a small --ce_weight",
    ),
    "student_mass_outside": (
        OUTSIDE_RISE,
        "the loss does not see it there: try a higher --jsd_top_k or --jsd_top_k_mode tail",
    ),
}
# The number that a share is of; an empty completion is a row without one.
SIZE_OF_SHARE = {"ended_by_budget": "completions", "empty_completions": "rows"}
LINE_SIGNALS = ("completion_length", "k_gen", *RISES)
KEPT = (*LINE_SIGNALS, "rows", "completions")  # of the first report
PROBE_SIGNALS = ("val/k_gen", "val/accuracy")
