"""Texts whose tokens are coloured by their KL, all on one scale (the paper's Fig. 6)."""

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from eval.figure_style import BODY, FAINT, INK, MARGIN, SMALL, WIDTH, frame, new_figure

Token = tuple[str, float, str]  # text, KL in nats, class
Sample = tuple[str, Sequence[Token]]

MOST = 8  # samples in one figure
CUT = 24  # characters of a token that are shown
MONO = "DejaVu Sans Mono"  # comes with matplotlib; all its letters have one width
COLUMNS = int((WIDTH - 2.5 * MARGIN) * 72 / (0.602 * SMALL))  # letters in a line
PITCH = 0.185  # inches from line to line
SCALE = 0.12  # inches of the colour bar
BELOW = 0.5  # inches of its ticks and label
MAP = colormaps["Blues"]
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "↵"})
# All cuts of the font are equally wide, so that the class of a token can be seen in its letters.
LETTERS = {
    "content": {"weight": "bold"},
    "number": {"weight": "bold"},
    "answer": {"weight": "bold"},
    "function": {"style": "italic"},
}
PERCENTILE = 0.98


def token_strips(
    samples: Sequence[Sample],
    title: str = "KL by token",
    *,
    top: float | None = None,
    caption: Sequence[str] = (),
) -> Figure:
    """Every token in a box that is the darker the larger its KL is.

    Args:
        samples: (title, [(text of a token, KL in nats, class of `eval.token_classes`)]); at most 8.
        top: KL of the darkest colour; default: the 98th percentile of all tokens. What lies above
            has that colour too, and the scale says so with an arrow.

    Raises:
        ValueError: no samples, too many, no tokens at all, or `top` is not above zero.
    """
    if not 1 <= len(samples) <= MOST:
        raise ValueError(f"{len(samples)} samples: pass 1 to {MOST}")
    every = [kl for _, tokens in samples for _, kl, _ in tokens]
    if not every:
        raise ValueError("nothing to draw: no sample has a token")
    top = _percentile(every) if top is None else top
    if top <= 0:
        raise ValueError(f"top must be above 0, got {top}: the largest KL is {max(every)}")
    scale = ScalarMappable(Normalize(0, top, clip=True), MAP)
    lines = [wrap(tokens) for _, tokens in samples]
    rows = sum(len(found) + 1.6 for found in lines)
    figure = new_figure()
    page, key = figure.subplots(2, 1, height_ratios=(rows * PITCH, SCALE))
    page.set(xlim=(0, COLUMNS), ylim=(rows, 0))
    page.set_axis_off()
    row = 0.0
    for (name, tokens), found in zip(samples, lines, strict=True):
        page.text(
            0, row + 0.9, _cut(name, COLUMNS - 12), va="bottom", fontsize=BODY, weight="bold",
            color=INK, parse_math=False,
        )  # fmt: skip
        _draw(page, row + 1, tokens, found, scale)
        row += len(found) + 1.6
    more = max(every) > top
    figure.colorbar(scale, cax=key, orientation="horizontal", extend="max" if more else "neither")
    key.set_xlabel("KL, nats", fontsize=BODY, color=INK)
    key.tick_params(labelsize=SMALL, labelcolor=INK)
    notes = ["Bold: content words, numbers, answers. Italic: function words.", *caption]
    if more:
        notes.append(f"The largest KL is {max(every):.3g}.")
    return frame(figure, rows * PITCH + SCALE + BELOW, title, [], notes)


def wrap(tokens: Sequence[Token]) -> list[list[tuple[int, int, str]]]:
    """Lines of (number of the token, column, shown text); a token is never broken."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for number, (text, _, _) in enumerate(tokens):
        shown = _shown(text)
        if column + len(shown) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((number, column, shown))
        column += len(shown)
    return lines


def _shown(text: str) -> str:
    """A token in letters that the font has: white space made visible, long ones cut."""
    letters = get_font(findfont(FontProperties(family=MONO)))
    text = text.translate(VISIBLE)
    if not text.strip():
        text = "␣" * max(1, len(text))
    text = "".join(letter if letters.get_char_index(ord(letter)) else "□" for letter in text)
    return _cut(text, CUT)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _draw(
    axis: Axes,
    top: float,
    tokens: Sequence[Token],
    lines: Sequence[Sequence[tuple[int, int, str]]],
    scale: ScalarMappable,
) -> None:
    for row, line in enumerate(lines):
        for number, column, shown in line:
            _, kl, token_class = tokens[number]
            face = scale.to_rgba(kl)
            axis.add_patch(
                Rectangle(
                    (column, top + row + 0.04),
                    len(shown),
                    0.92,
                    facecolor=face,
                    edgecolor=FAINT,
                    linewidth=0.5,
                    label=shown,
                )  # fmt: skip
            )
            axis.text(
                column + len(shown) / 2, top + row + 0.5, shown, ha="center", family=MONO,
                va="center_baseline", fontsize=SMALL, parse_math=False,
                color="white" if _dark(face) else "black", **LETTERS.get(token_class, {}),
            )  # fmt: skip


def _dark(color: Sequence[float]) -> bool:
    """Whether white letters have more contrast on it than black ones (relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def _percentile(values: Sequence[float]) -> float:
    """The smallest value that PERCENTILE of all do not exceed; the largest if that is not > 0."""
    ordered = sorted(values)
    value = ordered[math.ceil(PERCENTILE * len(ordered)) - 1]
    return value if value > 0 else ordered[-1]
