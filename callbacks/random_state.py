"""The random generators that a training run draws from: kept in a checkpoint, and set aside for a side look."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["drawn_apart", "random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """State of every generator that Lightning leaves out of its checkpoints, as tensors and plain numbers.

    Returns:
        ``torch``: the CPU's state, then each CUDA device's that is in use. ``python`` and ``numpy``: of the
        global generators, which transforms of a data set draw from where no worker does it.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        "torch": [torch.get_rng_state(), *cuda],
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": str(numpy["bit_generator"]), "has_gauss": int(numpy["has_gauss"]),
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)), "position": int(numpy["state"]["pos"]),
            "cached": float(numpy["gauss"]),
        },
    }  # fmt: skip


def set_random_state(state: Mapping[str, Any] | Sequence[Tensor]) -> None:
    """Take on what :func:`random_state` returned; devices that are not here any more are passed over.

    Args:
        state: Also the plain list of torch's states that checkpoints held before.
    """
    states = state["torch"] if isinstance(state, Mapping) else state
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), states[1:], strict=False):
            torch.cuda.set_rng_state(value.cpu(), device)
    if not isinstance(state, Mapping):
        return
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))


@contextmanager
def drawn_apart(seed: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Draw from the same numbers every time, and leave every generator as it was.

    Args:
        seed: Of what is drawn inside.
        generators: Those besides the global ones.
    """
    before = random_state()
    own = [generator.get_state() for generator in generators]
    torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed would start CUDA's
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
