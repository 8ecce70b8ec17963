"""The strategist: when, where and what to grow. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.tamiyo.config import BudgetConfig, ProbeConfig, TamiyoConfig, build_config
    from esper.tamiyo.controller import Controller
    from esper.tamiyo.policies.registry import make_policy, policy_names
    from esper.tamiyo.state import GrowthState, Policy, SeedView, SiteView

__all__ = [
    "BudgetConfig",
    "Controller",
    "GrowthState",
    "Policy",
    "ProbeConfig",
    "SeedView",
    "SiteView",
    "TamiyoConfig",
    "build_config",
    "make_policy",
    "policy_names",
]

_MODULES = {
    "BudgetConfig": "config",
    "Controller": "controller",
    "GrowthState": "state",
    "Policy": "state",
    "ProbeConfig": "config",
    "SeedView": "state",
    "SiteView": "state",
    "TamiyoConfig": "config",
    "build_config": "config",
    "make_policy": "policies.registry",
    "policy_names": "policies.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
