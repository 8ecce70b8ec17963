"""Networks fitted in parallel, each kept in a file as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from esper.errors import CheckpointError
from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.learning import checkpoint
from esper.tamiyo.learning.config import SupervisedConfig
from esper.tamiyo.learning.rows import ValueRow
from esper.tamiyo.learning.supervised import fit
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork

__all__ = ["Fit", "Fitted", "fit_all", "make_network"]


@dataclass(frozen=True)
class Fit:
    """One network to fit.

    Attributes:
        name: Unique in a learning; names its file.
        policy: Sizes of the network.
        config: Of the fit; its seed is that of the first weights too.
        train: To learn from.
        validation: To stop by.
    """

    name: str
    policy: PolicyConfig
    config: SupervisedConfig
    train: Sequence[ValueRow]
    validation: Sequence[ValueRow]

    @property
    def work(self) -> float:
        """In arbitrary units, at most."""
        return len(self.train) * self.config.max_epochs * (20.0 + self.policy.hidden_dim)


@dataclass(frozen=True)
class Fitted:
    """A network that was fitted.

    Attributes:
        name: Of the fit.
        policy: Sizes of the network.
        weights: State dict.
        best_epoch: Whose weights they are.
        history: Metrics of every epoch.
        seconds: It took.
    """

    name: str
    policy: PolicyConfig
    weights: Mapping[str, Tensor]
    best_epoch: int
    history: Sequence[Mapping[str, float]]
    seconds: float

    def network(self) -> TamiyoNetwork:
        """The network, in eval mode."""
        network = TamiyoNetwork(self.policy)
        network.load_state_dict(dict(self.weights))
        return network.eval()


def make_network(policy: PolicyConfig, seed: int) -> TamiyoNetwork:
    """A network with the first weights of a seed; torch's global random numbers stay as they are."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return TamiyoNetwork(policy)


def fit_all(
    fits: Sequence[Fit],
    folder: Path,
    workers: LocalWorkers,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Fitted]:
    """Fit what ``folder`` does not hold yet, the longest first, and return all by name.

    Args:
        fits: Of different names.
        folder: One file a fit.
        workers: Processes.
        done: Told of each that is there.

    Raises:
        LearningError: A loss or gradient is not finite.
        WorkerError: A process died.
    """
    assert len({f.name for f in fits}) == len(fits)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [f for f in fits if not (folder / _file(f.name)).is_file()]
    for f in fits:
        if f not in todo:
            done(f.name)
    todo.sort(key=lambda f: -f.work)
    size = max(1, workers.num_workers)
    for start in range(0, len(todo), size):
        part = todo[start : start + size]
        for name in workers.map(partial(_fit_one, folder=folder), part):
            done(name)
    return {f.name: _read(folder / _file(f.name)) for f in fits}


def _fit_one(task: Fit, folder: Path) -> str:
    started = time.perf_counter()
    network = make_network(task.policy, task.config.seed)
    result = fit(network, task.train, task.validation, task.config)
    state: dict[str, Any] = {
        "name": task.name,
        "policy": asdict(task.policy),
        "weights": network.state_dict(),
        "best_epoch": result.best_epoch,
        "history": list(result.history),
        "seconds": time.perf_counter() - started,
    }
    checkpoint.save(folder / _file(task.name), state)
    return task.name


def _read(path: Path) -> Fitted:
    state = checkpoint.load(path)
    try:
        return Fitted(**{**state, "policy": msgspec.convert(state["policy"], PolicyConfig)})
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path} is no fitted network of this version: {error!r}; delete it") from error


def _file(name: str) -> str:
    return f"{name}.safetensors"
