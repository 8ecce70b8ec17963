"""Keep libraries' advice that a user cannot act on out of what our commands print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

_LEVELS = {
    "lightning.pytorch": logging.WARNING,  # hardware found, tips
    "lightning.fabric": logging.WARNING,
    "torch.onnx": logging.ERROR,  # one warning for each torchvision operator, which no host here uses
}
_WARNINGS = (
    # The reference data are in memory: workers would only cost.
    r".*does not have many workers.*",
    # A short epoch logs its last step anyway.
    r".*smaller than the logging interval.*",
    # Lightning 2.6 and torch.export ask torch >= 2.13 in a way that is being retired.
    r".*isinstance\(treespec, LeafSpec\).*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Run a block without the messages listed in this module; all others come through."""
    levels = {name: logging.getLogger(name).level for name in _LEVELS}
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
