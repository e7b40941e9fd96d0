"""All figures of the report under one name: typed values in, matplotlib figures out."""

from eval.figures_bars import controls, gains, interventions, sweep, wins_and_losses
from eval.figures_lines import attention_by_layer, curves, radar
from eval.figures_speed import frontier, latency, pareto
from eval.figures_tokens import token_strips

__all__ = [
    "attention_by_layer",
    "controls",
    "curves",
    "frontier",
    "gains",
    "interventions",
    "latency",
    "pareto",
    "radar",
    "sweep",
    "token_strips",
    "wins_and_losses",
]
