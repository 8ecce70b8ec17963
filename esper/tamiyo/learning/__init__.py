"""Learning to decide: value models fitted to tried candidates, and decoupled PPO with prioritised replay.

Names load on first use: who only reads a trajectory needs neither an optimizer nor scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.tamiyo.learning.boosting import BoostedValues
    from esper.tamiyo.learning.config import SupervisedConfig, TrainingConfig
    from esper.tamiyo.learning.decision_metrics import decision_metrics
    from esper.tamiyo.learning.replay import ReplayBuffer
    from esper.tamiyo.learning.rows import ValueRow, oracle_rows
    from esper.tamiyo.learning.supervised import fit
    from esper.tamiyo.learning.trainer import PolicyTrainer
    from esper.tamiyo.learning.trajectory import Trajectory, Transition

__all__ = [
    "BoostedValues",
    "PolicyTrainer",
    "ReplayBuffer",
    "SupervisedConfig",
    "TrainingConfig",
    "Trajectory",
    "Transition",
    "ValueRow",
    "decision_metrics",
    "fit",
    "oracle_rows",
]

_HOMES = {
    "boosting": ("BoostedValues",),
    "config": ("SupervisedConfig", "TrainingConfig"),
    "decision_metrics": ("decision_metrics",),
    "replay": ("ReplayBuffer",),
    "rows": ("ValueRow", "oracle_rows"),
    "supervised": ("fit",),
    "trainer": ("PolicyTrainer",),
    "trajectory": ("Trajectory", "Transition"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
