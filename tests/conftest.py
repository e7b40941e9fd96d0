"""Fixtures shared by the tests. Markers are declared in pyproject.toml."""

import pytest
import torch

from tests.tiny_model import FakeTokenizer, tiny_bagel


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and tests may run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture(scope="session")
def shared_bagel():
    """A random miniature model; tests that change weights build their own with `tiny_bagel`."""
    return tiny_bagel().requires_grad_(False)
