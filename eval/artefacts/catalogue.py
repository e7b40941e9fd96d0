"""Every artefact: its name, its place in the paper, the steps it needs, and how it is built."""

from collections.abc import Callable
from dataclasses import dataclass

from eval.artefacts import extras, pictures, tables
from eval.artefacts.cases import cases
from eval.artefacts.claims import CLAIMS
from eval.artefacts.ledger import ledger
from eval.artefacts.model import Artefact, Block
from eval.artefacts.runs import Runs
from train.config import UsageError

Build = Callable[[Runs], list[Block]]


@dataclass(frozen=True)
class Recipe:
    """An artefact before it is built. needs: patterns of names of steps, for `--only`."""

    title: str
    place: str
    needs: tuple[str, ...]
    build: Build
    about: tuple[str, ...] = ()


def _present(*blocks: Block | None) -> list[Block]:
    return [block for block in blocks if block is not None]


EVERY_SEED = ("seed*/systems", "seed*/pairs")
ARTEFACTS: dict[str, Recipe] = {
    "ledger": Recipe(
        "Claims of the paper, and what runs here say", "all", ("*",),
        lambda runs: [*ledger(runs, CLAIMS)],
        ("A status follows from the numbers by the rule beside it. The paper's values are of a 7B "
         "model on nine benchmarks; what is measured here is told by each row's sources.",),
    ),
    "table1": Recipe(
        "K_gen: how far visual thoughts move the base", "Table 1", ("seed*/kl",),
        lambda runs: [tables.table1(runs)],
    ),
    "table2": Recipe(
        "Main results", "Table 2", (*EVERY_SEED, "latency"),
        lambda runs: [*tables.table2(runs), extras.per_seed(runs)],
        ("The untrained student in text alone and SFT from the same model are always in it; the "
         "paper leaves both out.",),
    ),
    "table3": Recipe(
        "What the teacher sees decides", "Table 3", EVERY_SEED,
        lambda runs: [tables.table3(runs)],
    ),
    "table4": Recipe(
        "Output tokens", "Table 4, App. G", ("seed*/systems",),
        lambda runs: [*tables.table4(runs)],
    ),
    "table5": Recipe(
        "Gap closing", "Table 5, App. I", ("seed*/kl", "seed*/kl_own", "seed*/systems"),
        lambda runs: [*tables.table5(runs)],
    ),
    "table6": Recipe(
        "Sensitivity", "Table 6, App. J", ("sweep/*",),
        lambda runs: _present(tables.table6(runs), pictures.sweeps(runs)),
        ("One seed each; in the miniature with half the updates.",),
    ),
    "figure1": Recipe(
        "Accuracy, gains and cost", "Fig. 1", (*EVERY_SEED, "latency"),
        lambda runs: _present(*pictures.figure1(runs)),
    ),
    "figure3a": Recipe(
        "Visual thoughts replaced at inference", "Fig. 3a", ("seed*/systems", "seed*/controls"),
        lambda runs: _present(pictures.figure3a(runs), extras.pilot(runs)),
        ("Noise takes the place of the decoded picture, before VAE and image encoder.",),
    ),
    "figure3b": Recipe(
        "Attention by layer", "Fig. 3b", ("attention",),
        lambda runs: _present(pictures.figure3b(runs), pictures.attention_table(runs)),
        ("Softmax of q k / sqrt(d) under the model's own mask, checked against its kernel; means "
         "over heads, generated tokens and samples.",),
    ),
    "figure5": Recipe(
        "Wins and losses", "Fig. 5", ("seed*/pairs",),
        lambda runs: _present(pictures.figure5(runs), tables.wins(runs)),
    ),
    "figure6": Recipe(
        "Which tokens the visual thoughts move", "Fig. 6, App. F",
        ("microscope*", "seed*/token_classes"),
        lambda runs: _present(
            pictures.figure6(runs), extras.token_classes(runs), extras.token_test(runs)
        ),
        ("The strips show the first sample of each task, before training; more of them, token by "
         "token, are in microscope/microscope.html and, after training on what the student writes, "
         "in microscope_opsd/microscope.html.",),
    ),
    "figure7": Recipe(
        "Transfer by task, and seconds", "Fig. 7, App. H", ("seed*/systems", "latency"),
        lambda runs: _present(*pictures.figure7(runs), tables.latency(runs)),
    ),
    "cases": Recipe(
        "Cases", "App. K, L", ("cases",), cases,
        ("The first of each kind in the order of the data set, not picked by hand.",),
    ),
    "controls": Recipe(
        "Controls", "not in the paper", ("seed*/kl", "seed*/controls"),
        lambda runs: _present(
            pictures.controls(runs), extras.kl_controls(runs), extras.accuracy_controls(runs)
        ),
        ("What other pictures do in the place of the visual thoughts, on the same completions, "
         "questions and seeds.",),
    ),
    "training": Recipe(
        "Checkpoints over training", "not in the paper", ("seed*/opsd", "seed*/noise"),
        lambda runs: _present(
            *pictures.learning(runs), *pictures.live_gap(runs), extras.health(runs),
            extras.checkpoints(runs),
        ),
        ("On validation data; test data has no say in what is kept.",),
    ),
    "theorem": Recipe(
        "Theorem 1 by numbers", "App. B", ("theorem",), lambda runs: [extras.theorem(runs)]
    ),
}  # fmt: skip
ALIASES = {
    "appendix_b": "theorem", "appendix_f": "figure6", "appendix_g": "table4",
    "appendix_h": "figure7", "appendix_i": "table5", "appendix_j": "table6",
    "appendix_k": "cases", "appendix_l": "cases",
}  # fmt: skip


def artefact(name: str) -> Recipe:
    """The recipe of a name or alias.

    Raises:
        UsageError: there is none.
    """
    name = ALIASES.get(name, name)
    if name not in ARTEFACTS:
        raise UsageError(f"--only {name}: there is {', '.join(ARTEFACTS)}; or {', '.join(ALIASES)}")
    return ARTEFACTS[name]


def build_all(make: Callable[[], Runs]) -> list[Artefact]:
    """Build all artefacts; each notes what it missed.

    Args:
        make: gives `Runs` over the results, new for each artefact.
    """
    built = []
    for name, recipe in ARTEFACTS.items():
        runs = make()
        blocks = recipe.build(runs)
        missing = tuple(runs.missing)
        remedy = f"{runs.plan.command} --only {name}" if missing else ""
        built.append(
            Artefact(name, recipe.title, recipe.place, recipe.about, tuple(blocks), missing, remedy)
        )
    return built
