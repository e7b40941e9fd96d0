"""A contact sheet of the miniature world: problem, visual thought and texts, enlarged."""

import random
import textwrap

from PIL import Image, ImageDraw, ImageFont

from data.miniworld.record import MiniRecord
from data.miniworld.world import TASKS, draw

ZOOM = 3
MARGIN = 14
_INK, _MUTED, _BACKGROUND = (28, 30, 40), (120, 122, 130), (255, 255, 255)


def contact_sheet(seed: int, per_task: int = 4) -> Image.Image:
    """One row of panels per draw, one column of panels per task."""
    rng = random.Random(f"{seed}/preview")
    columns = [[_panel(draw(task, rng)) for _ in range(per_task)] for task in TASKS]
    width, height = columns[0][0].size
    top = 34
    sheet = Image.new("RGB", (len(TASKS) * width + MARGIN, top + per_task * height), _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for x, (task, panels) in enumerate(zip(TASKS, columns, strict=True)):
        pen.text((x * width + MARGIN, 8), task.replace("_", " "), fill=_INK, font=font)
        for y, panel in enumerate(panels):
            sheet.paste(panel, (x * width, top + y * height))
    return sheet


def _panel(record: MiniRecord) -> Image.Image:
    """Problem and visual thought side by side, the texts below."""
    side = record.problem_image.width * ZOOM
    panel = Image.new("RGB", (2 * side + 3 * MARGIN, side + 92), _BACKGROUND)
    for slot, image in enumerate((record.problem_image, record.visual_thought)):
        enlarged = image.resize((side, side), Image.Resampling.NEAREST)
        panel.paste(enlarged, (MARGIN + slot * (side + MARGIN), 4))
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    texts = (
        (_INK, f"Q: {record.question}"),
        (_MUTED, f"{record.thoughts[0]} [VT] {record.thoughts[1]}"),
        (_MUTED, f"text only: {record.full_text_only_thought}"),
        (_INK, f"A: {record.answer}"),
    )
    for line, (colour, text) in enumerate(texts):
        short = textwrap.shorten(text, width=60, placeholder="...")
        pen.text((MARGIN, side + 10 + 18 * line), short, fill=colour, font=font)
    return panel
