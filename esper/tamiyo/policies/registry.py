"""Make a policy from its name and options. Imports no torch until a policy is made."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from esper.errors import ConfigError

if TYPE_CHECKING:
    from esper.tamiyo.state import Policy

__all__ = ["make_policy", "policy_names", "policy_options"]

_POLICIES = {
    "cond": "CondPolicy",
    "dimensions": "DimensionsPolicy",
    "expressivity": "ExpressivityPolicy",
    "narrowest": "NarrowestPolicy",
    "off": "OffPolicy",
    "random": "RandomPolicy",
    "remote": "RemotePolicy",
    "schedule": "SchedulePolicy",
    "shortcut": "ShortcutPolicy",
    "tamiyo": "TamiyoPolicy",
    "uniform": "UniformPolicy",
}
"""Policy name, which is also its module's, -> class. A class names its options in ``config_type``."""


def policy_names() -> list[str]:
    """Names that :func:`make_policy` knows, sorted."""
    return sorted(_POLICIES)


def policy_options(name: str) -> type[Any]:
    """The dataclass of the options of the policy called ``name``.

    Raises:
        ConfigError: The name is unknown.
    """
    options: type[Any] = _policy(name).config_type
    return options


def make_policy(name: str, **options: Any) -> Policy:
    """Make the policy called ``name``.

    Args:
        name: One of :func:`policy_names`.
        **options: Fields of the policy's ``config_type``.

    Raises:
        ConfigError: The name or an option is unknown, or a value is out of range.
    """
    policy = _policy(name)
    known = [field.name for field in dataclasses.fields(policy.config_type)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"policy {name!r} has no option {', '.join(map(repr, unknown))}; {has}")
    made: Policy = policy(policy.config_type(**options))
    return made


def _policy(name: str) -> Any:
    if name not in _POLICIES:
        raise ConfigError(f"no policy named {name!r}; policies are {', '.join(policy_names())}")
    return getattr(importlib.import_module(f"esper.tamiyo.policies.{name}"), _POLICIES[name])
