"""Tests: numbers and invariants, run with bash scripts/test.sh."""
