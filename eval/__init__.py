"""Measurements of checkpoints: the KL diagnostic with gap closing, and accuracy."""
