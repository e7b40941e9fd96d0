"""The page of the token microscope: one file, all text escaped, no server and nothing to load.

Every token is a link to its row in the table of its sample, so that without JavaScript nothing is
missing. The script shows that row beside the text as soon as a token is hovered, focused or tapped;
arrow keys go from token to token.
"""

import base64
import io
import math
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import PIL.Image

from data.example import Example

EDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # nats, between the seven shades of KL_t
SIDE = 512  # pixels of a picture at most
TINY = 128  # pixels; below it pixels stay squares
# What a reader should see of white space; a line break also breaks the line.
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
COLUMNS = (
    "token", "KL, nats", "JSD, nats", "teacher would say", "student would say", "class",
    "entries at the clip", "p, teacher", "p, student", "entropy, teacher", "entropy, student",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One model's next-token distribution at a row.

    top: the likeliest tokens with their ids and probabilities. p: of the token that is there.
    entropy: nats.
    """

    top: tuple[tuple[str, int, float], ...]
    p: float
    entropy: float


@dataclass(frozen=True)
class Token:
    """A token of a completion and the row that predicts it. kl, jsd: nats. clipped: entries of the
    row's JSD at the clip, of `entries` that are compared.
    """

    text: str
    id: int
    token_class: str
    kl: float
    jsd: float
    clipped: int
    entries: int
    teacher: Side
    student: Side


@dataclass(frozen=True)
class Slide:
    """One sample under the microscope, with one token at least."""

    example: Example
    tokens: tuple[Token, ...]

    @property
    def mean_kl(self) -> float:
        """What the sample adds to K_gen, nats per token."""
        return sum(token.kl for token in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Header:
    """What holds for all samples of a page.

    clip: limit of an entry in nats, None without one. intro, transition: what the teacher reads
    before and after the visual thoughts. origin: command, seed and commit.
    """

    teacher: str
    student: str
    completions: str
    divergence: str
    clip: float | None
    intro: str
    transition: str
    origin: str


def page(slides: Sequence[Slide], header: Header) -> str:
    """The whole page."""
    sections = [_section(slide, number, header) for number, slide in enumerate(slides)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Token microscope</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{_head(slides, header)}\n{''.join(sections)}"
        f"<footer>{_text(header.origin)}</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(slides: Sequence[Slide], header: Header) -> str:
    facts = {
        "Teacher": f"{header.teacher}, shown the problem and its visual thoughts",
        "Student": f"{header.student}, shown the problem alone",
        "Text": header.completions,
        "JSD": header.divergence,
    }
    items = "".join(f"<dt>{name}</dt><dd>{_text(text)}</dd>" for name, text in facts.items())
    links = "".join(
        f'<li><a href="#s{n}">{_text(slide.example.key)}</a> {slide.mean_kl:.4f}</li>'
        for n, slide in enumerate(slides)
    )
    return (
        "<header><h1>Token microscope</h1><p>Both models read the same text. The colour of a token "
        "is the stronger the further the teacher's prediction was from the student's: "
        f'KL<sub>t</sub>, in nats, over the whole vocabulary.</p><dl class="facts">{items}</dl>'
        f"{_legend(header.clip)}<details><summary>Samples and their mean KL<sub>t</sub></summary>"
        f'<ul class="samples">{links}</ul></details></header>'
    )


def _legend(clip: float | None) -> str:
    names = [f"< {EDGES[0]:g}", *(f"≥ {edge:g}" for edge in EDGES)]
    shades = "".join(f'<li class="k{n}">{escape(name)}</li>' for n, name in enumerate(names))
    marked = ""
    if clip is not None:
        marked = (
            '<li class="k0 clip">token</li><li class="plain">two lines below: at least one entry '
            f"of its JSD is at the clip of {clip:g} nats</li>"
        )
    return f'<ul class="legend" aria-label="Shades of KL, nats">{shades}{marked}</ul>'


def _section(slide: Slide, number: int, header: Header) -> str:
    example, clipped = slide.example, sum(token.clipped > 0 for token in slide.tokens)
    tokens = "".join(_token(token, f"s{number}t{n}") for n, token in enumerate(slide.tokens))
    rows = "".join(_row(token, f"s{number}t{n}") for n, token in enumerate(slide.tokens))
    titles = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    return (
        f'<section id="s{number}" aria-labelledby="h{number}"><h2 id="h{number}">'
        f'{_text(example.key)}</h2><div class="desk"><div>{_pictures(example)}'
        f'<dl class="facts"><dt>Question</dt><dd>{_text(example.question)}</dd>'
        f"<dt>Right answer</dt><dd>{_text(example.answer)}</dd>"
        f"<dt>Tokens</dt><dd>{len(slide.tokens)}, mean KL<sub>t</sub> {slide.mean_kl:.4f} nats, "
        f"{clipped} with entries at the clip</dd></dl>{_prompts(header)}"
        f'<p class="tokens">{tokens}</p></div><aside class="panel" aria-live="polite">'
        "<p>Hover, focus or tap a token. Arrow keys go on.</p></aside></div>"
        f"<details><summary>All tokens as a table</summary>"
        f'<div class="wide" tabindex="0" role="region" aria-label="All tokens"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        "</section>\n"
    )


def _prompts(header: Header) -> str:
    """What the teacher alone reads around the visual thoughts."""
    if not (header.intro or header.transition):
        return ""
    return (
        "<details><summary>The teacher's prompts</summary><p>Before the visual thoughts:</p>"
        f"<pre>{_text(header.intro)}</pre><p>After them:</p><pre>{_text(header.transition)}</pre>"
        "</details>"
    )


def _pictures(example: Example) -> str:
    figures = [_figure(example.problem_image, "problem, seen by both")]
    count = len(example.visual_thoughts)
    for number, picture in enumerate(example.visual_thoughts, start=1):
        place = f" {number} of {count}" if count > 1 else ""
        figures.append(_figure(picture, f"visual thought{place}, seen by the teacher alone"))
    return f'<div class="pictures">{"".join(figures)}</div>'


def _figure(picture: PIL.Image.Image, title: str) -> str:
    tiny = ' class="tiny"' if max(picture.size) < TINY else ""
    return (
        f'<figure><img{tiny} alt="{title}" src="data:image/png;base64,{_png(picture)}">'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _png(picture: PIL.Image.Image) -> str:
    shown = picture.copy()
    shown.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def shade(kl: float) -> int:
    """Which of the seven shades a KL_t has; an edge belongs to the darker one."""
    return bisect(EDGES, kl)


def visible(text: str) -> str:
    """A token as html: white space as signs, and a token without any text as one, too."""
    if not text:
        return '<span class="ws">∅</span>'
    return "".join(
        f'<span class="ws">{SIGNS[sign]}</span>' if sign in SIGNS else _text(sign) for sign in text
    )


def _text(text: str) -> str:
    """Escaped text; what cannot be printed, and what turns the reading order, as its number."""
    shown = (
        sign if sign.isprintable() or sign in "\n\t" else f"[U+{ord(sign):04X}]" for sign in text
    )
    return escape("".join(shown))


def _token(token: Token, name: str) -> str:
    clip = " clip" if token.clipped else ""
    broken = "<br>" if "\n" in token.text else "<wbr>"
    return f'<a class="t k{shade(token.kl)}{clip}" href="#{name}">{visible(token.text)}</a>{broken}'


def _row(token: Token, name: str) -> str:
    sides = (token.teacher, token.student)
    cells = [
        visible(token.text),
        number(token.kl),
        number(token.jsd),
        *(_likeliest(side, token.id) for side in sides),
        _text(token.token_class),
        f"{token.clipped} of {token.entries}",
        *(share(side.p) for side in sides),
        *(number(side.entropy) for side in sides),
    ]
    body = "".join(
        f'<td data-label="{label}">{cell}</td>' for label, cell in zip(COLUMNS, cells, strict=True)
    )
    return f'<tr id="{name}">{body}</tr>'


def _likeliest(side: Side, said: int) -> str:
    """The likeliest tokens, the one that is there in bold, with a bar for the probability."""
    return f"<ol>{''.join(_choices(side, said))}</ol>"


def _choices(side: Side, said: int) -> Iterable[str]:
    for text, id, p in side.top:
        token = f"<b>{visible(text)}</b>" if id == said else visible(text)
        bar = f'<i style="width:{100 * p:.1f}%"></i>'
        yield f"<li><code>{token}</code> <span>{share(p)}</span>{bar}</li>"


def number(value: float) -> str:
    """Nats to four digits; what rounds to nothing is said to be that small."""
    if not math.isfinite(value):
        return str(value)
    return "&lt; 0.0001" if 0 < abs(value) < 1e-4 else f"{value:.4f}"


def share(p: float) -> str:
    """A probability in percent, without claiming 0 or 100 by rounding."""
    if 0 < p < 0.0005:
        return "&lt; 0.1 %"
    if 0.9995 <= p < 1:
        return "&gt; 99.9 %"
    return f"{100 * p:.1f} %"


# Shades differ in lightness alone, so that they need no colour vision; in the dark they are lit.
CSS = """
:root { --paper: #fff; --ink: #1b1c21; --soft: #5c5f69; --line: #d5d7dd; --card: #f5f6f8;
  --link: #1d4fa3; --ring: #1d4fa3; --bar: #8b93a5;
  --k1: #fdeeda; --k2: #fbd5a8; --k3: #f4b06c; --k4: #de8034; --k5: #ab4c0c; --k6: #6b2604;
  --i1: #1b1c21; --i4: #1b1c21; --i5: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --ink: #e8e9ec; --soft: #a4a8b3;
  --line: #3a3d46; --card: #1e2026; --link: #9cc0ff; --ring: #9cc0ff; --bar: #70788a;
  --k1: #2e2119; --k2: #4b2f17; --k3: #6e4416; --k4: #d08232; --k5: #efae62; --k6: #ffdcae;
  --i1: #f4f4f5; --i4: #15161a; --i5: #15161a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
p { margin: 0 0 .75rem; max-width: 46rem; }
a { color: var(--link); }
section { border-top: 1px solid var(--line); padding: 1.25rem 0; }
footer { border-top: 1px solid var(--line); padding-top: 1rem; color: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .5rem;
  margin: 0 0 .5rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem;
  margin: 0 0 .75rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: .75rem; }
figure { margin: 0; width: 11rem; }
figure img { width: 100%; display: block; border: 1px solid var(--line); }
figure img.tiny { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: .85rem; }
.legend, .samples { list-style: none; margin: 0 0 .75rem; padding: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; font-size: .85rem; }
.legend li { padding: .1rem .5rem; border: 1px solid var(--line); border-radius: .2rem; }
.legend .plain { border: 0; padding: 0; color: var(--soft); }
.desk { display: grid; grid-template-columns: minmax(0, 1fr) 25rem; gap: 1.5rem;
  margin: .75rem 0; }
.panel { align-self: start; }
.tokens { font: 1.05rem/2.1 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  margin: 0; max-width: none; overflow-wrap: anywhere; }
.t { padding: .2rem .1rem; margin: 0 1px; border-radius: .2rem; text-decoration: none;
  color: var(--ink); box-shadow: inset 0 0 0 1px var(--line); }
.k1, .k2, .k3 { color: var(--i1); } .k4 { color: var(--i4); } .k5, .k6 { color: var(--i5); }
.k1 { background: var(--k1); } .k2 { background: var(--k2); } .k3 { background: var(--k3); }
.k4 { background: var(--k4); } .k5 { background: var(--k5); } .k6 { background: var(--k6); }
.t.clip, .legend .clip { border-bottom: 5px double var(--ink); background-clip: padding-box; }
.t:hover, .t:focus, .t.on { outline: 3px solid var(--ring); outline-offset: 1px; }
.ws { opacity: .6; }
.panel { position: sticky; top: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .75rem; font-size: .9rem; }
.panel p { margin: 0; color: var(--soft); }
.panel dl { margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: .4rem .75rem; }
.panel dt { color: var(--soft); font-size: .8rem; } .panel dd { margin: 0; }
.panel .first { grid-column: 1 / -1; font: 1.2rem ui-monospace, monospace; }
ol { list-style: none; margin: 0; padding: 0; min-width: 8.5rem; }
ol li { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: .5rem; }
ol li i { grid-column: 1 / -1; height: 3px; background: var(--bar); }
code { font: .95em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-height: 32rem; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--card); }
tr:target { background: var(--card); }
@media (max-width: 56rem) {
  .desk { grid-template-columns: minmax(0, 1fr); }
  .panel { top: auto; bottom: 0; margin: 0 -1rem; border-radius: 0; max-height: 46vh;
    overflow: auto; }
  .t { scroll-margin: 3rem 0 50vh; }
  figure { width: 9.5rem; } }
"""

SCRIPT = """
for (const desk of document.querySelectorAll('.desk')) {
  const tokens = [...desk.querySelectorAll('.t')], panel = desk.querySelector('.panel');
  let current = tokens[0];
  const show = token => {
    const list = document.createElement('dl');
    for (const cell of document.getElementById(token.hash.slice(1)).cells) {
      const item = document.createElement('div'), title = document.createElement('dt');
      const value = document.createElement('dd');
      title.textContent = cell.dataset.label;
      value.append(...cell.cloneNode(true).childNodes);
      item.append(title, value);
      if (!list.children.length) item.className = 'first';
      list.append(item);
    }
    panel.replaceChildren(list);
    current.classList.remove('on');
    current.tabIndex = -1;
    current = token;
    token.classList.add('on');
    token.tabIndex = 0;
  };
  tokens.forEach((token, place) => {
    token.tabIndex = place ? -1 : 0;
    token.addEventListener('mouseenter', () => show(token));
    token.addEventListener('focus', () => show(token));
    token.addEventListener('click', event => { event.preventDefault(); show(token); });
    token.addEventListener('keydown', event => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = tokens[place + (step || 0)];
      if (!step || !next) return;
      event.preventDefault();
      next.focus();
    });
  });
}
"""
