"""Checks of this model against stored reference numbers; see `python -m tests.check_goldens`."""
