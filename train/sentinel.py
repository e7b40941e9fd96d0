"""The collapse sentinel: notices a run that goes wrong, and does what --sentinel says.

It looks at what is logged anyway: at every metric line, and at every validation. Each look has a
light, of the signals that this kind of look can see:

    green  0    nothing is beyond its limit
    yellow 1    a signal is, for the first time in a row; one look may be chance
    red    2    a signal is in two consecutive looks of its kind, and the policy acts

    warn                  says so
    lower_lr              also multiplies the learning rate by 0.1 from the next update on, at most
                          twice, and begins to count anew
    stop_and_keep_best    also ends the run with a checkpoint; `best` is what validation kept

All ranks see the same numbers, so all decide alike without asking each other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from train.metrics import say

Policy = Literal["off", "warn", "lower_lr", "stop_and_keep_best"]
GREEN, YELLOW, RED = 0, 1, 2

# Of the base's on the probe set. Above 1 the student is further from the base that sees visual
# thoughts than the base without them, so training has added to the gap; a half more allows for the
# overshoot at the peak of the learning rate, from which sound runs come back by the next look.
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
LR_CUT, MOST_CUTS = 0.1, 2  # a hundredth of the learning rate and still red: it is not the rate


@dataclass(frozen=True)
class Signal:
    """Something beyond its limit. value and limit: as they are shown."""

    name: str
    value: str
    limit: str
    remedy: str


@dataclass(frozen=True)
class State:
    """What a resumed run needs, as json has it.

    first: the first report. counts: signal -> looks in a row that saw it. cuts: of the learning
    rate. stopped: why the sentinel ended the run.
    """

    first: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    stopped: str | None = None


@dataclass(frozen=True)
class Setting:
    """What a run tells its sentinel.

    completions: in a metric line. announce: this rank says what there is to say.
    """

    policy: Policy
    total_steps: int
    completions: int
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
        """Look at a metric line; what to add to it. The first one is what others are held to."""
        if not self.state.first:
            names = ("completion_length", *RISES)
            first = {name: line[name] for name in names if name in line}
            self.state = replace(self.state, first=first)
        return self._look(int(line["step"]), LINE_SIGNALS, self._of_line(line))

    def validation(
        self, step: int, history: Sequence[Mapping[str, float]], now: Mapping[str, float]
    ) -> dict[str, float]:
        """Look at a validation; what to add to its metric line.

        history: overall scores of the validations before it, the base's first.
        """
        return self._look(step, PROBE_SIGNALS, of_validation(history, now))

    def _look(self, step: int, kind: Sequence[str], signals: Iterator[Signal]) -> dict[str, float]:
        """Count what was seen among the signals of this kind; those of the other keep theirs."""
        if self.setting.policy == "off":
            return {}
        seen = {signal.name: signal for signal in signals}
        counts = {name: self.state.counts.get(name, 0) + 1 for name in seen}
        others = {name: n for name, n in self.state.counts.items() if name not in kind}
        self.state = replace(self.state, counts=others | counts)
        for name, signal in seen.items():
            if counts[name] <= RED:  # once each
                self._say(step, "yellow" if counts[name] == YELLOW else "red", signal)
        light = min(max(counts.values(), default=GREEN), RED)
        fresh = [signal for name, signal in seen.items() if counts[name] >= RED]
        if fresh and step < self.setting.total_steps:
            self._act(step, fresh[0])
        return {"sentinel": float(light)}

    def _of_line(self, line: Mapping[str, float]) -> Iterator[Signal]:
        return of_line(line, self.state.first, self.setting.completions)

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

    One that is no longer to stop the run lets go of having stopped it.
    """
    state = State(**progress)
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
            "the student moves away from what the visual thoughts show: try a lower --lr, a higher "
            "--jsd_token_clip or none (0), or a --jsd_beta nearer 0",
        )
    best = max(scores["accuracy"] for scores in history)
    if best - now["accuracy"] > ACCURACY_DROP + 1e-9:  # ten points exactly are not more
        yield Signal(
            "val/accuracy",
            f"{now['accuracy']:.1%}",
            f"more than {100 * ACCURACY_DROP:g} points below {best:.1%}, the best so far",
            "go back to `best`; try a slower teacher (a higher --ema_decay), a lower --lr or fewer "
            "--total_steps",
        )


def of_line(
    line: Mapping[str, float], first: Mapping[str, float], completions: int
) -> Iterator[Signal]:
    """Signals of the on-policy completions; what a line lacks (see --jsd_loss_kind) is none.

    Where a line has few completions, a share of them may be higher by chance: two standard errors
    of the difference of two shares, at most, are allowed for.
    """
    chance = 2 * math.sqrt(0.5 / completions)
    if "completion_length" in line and "completion_length" in first:
        length, before = line["completion_length"], first["completion_length"]
        low, high = (ratio * before for ratio in LENGTH_RATIOS)
        if not low <= length <= high:
            yield Signal(
                "completion_length",
                f"{length:.1f}",
                f"outside {low:.1f} to {high:.1f}, half and twice the first report",
                "look at what the student writes; try a lower --lr",
            )
    for name, (least, remedy) in RISES.items():
        rise = max(least, chance) if name in SHARES_OF_COMPLETIONS else least
        if name in line and name in first and line[name] > first[name] + rise:
            limit = f"more than {rise:.2g} above {first[name]:.3f}, the first report"
            yield Signal(name, f"{line[name]:.3f}", limit, remedy)


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
SHARES_OF_COMPLETIONS = ("ended_by_budget", "empty_completions")
LINE_SIGNALS = ("completion_length", *RISES)
PROBE_SIGNALS = ("val/k_gen", "val/accuracy")
