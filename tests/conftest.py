"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tiny nets: a second thread only waits for the first, and for the other test worker.
torch.set_num_threads(1)


@pytest.fixture
def data_dir() -> Path:
    """The folder that ``ESPER_DATA_DIR`` names; a test that needs its files is skipped without it."""
    root = os.environ.get("ESPER_DATA_DIR")
    if not root:
        pytest.skip("ESPER_DATA_DIR is not set, so Fashion-MNIST and tiny Shakespeare are not here")
    return Path(root)
