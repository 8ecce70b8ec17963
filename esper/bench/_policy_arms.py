"""Which arms the judgement of a policy has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.errors import CheckpointError, ConfigError
from esper.tamiyo.judging.arms import Arm, Learned, LookingAhead, Plain
from esper.tamiyo.judging.figures import NONE
from esper.tamiyo.judging.rules import ChosenRules
from esper.tamiyo.network.weights import shipped
from esper.tamiyo.policies.tamiyo import TamiyoPolicyConfig

__all__ = ["DOUBLE", "LEARNED", "LOOK_AHEAD", "NO_GATE", "NO_SHORTCUT", "VALUE", "judged_arms"]

LEARNED = "learned"
"""The policy with its gate, its fallback and all candidates, as it ships."""
VALUE = "value"
"""The value model that PPO began from, with the same settings."""
NO_GATE = "no_gate"
"""It never abstains."""
NO_SHORTCUT = "no_shortcut"
"""It is offered no way around hidden layers; its fallback is ``cond``, which knows none either."""
DOUBLE = "rate_x2"
LOOK_AHEAD = "look_ahead"


def judged_arms(
    rules: ChosenRules,
    *,
    weights: str,
    value_weights: str,
    only: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Arm]:
    """Name -> arm.

    Args:
        rules: Fixed rules with their options.
        weights: Of the policy; ``shipped`` for the package's own, empty for no learned arm.
        value_weights: Of the value model; empty for none.
        only: Names of the arms that are wanted; empty for all.
        options: Of policy ``tamiyo``, for all learned arms.

    Raises:
        ConfigError: An arm is not known or needs weights that are not given, an option will not do, or nothing
            ships.
        CheckpointError: A file of weights is missing.
    """
    arms: dict[str, Arm] = {
        NONE: Plain(),
        DOUBLE: Plain(factor=2.0),
        **rules.arms,
        LOOK_AHEAD: LookingAhead(),
    }
    given = dict(options or {})
    if taken := sorted({"weights", "price"} & set(given)):
        raise ConfigError(
            f"policy_options should not hold {', '.join(taken)}: they come with the arm and the host"
        )
    try:
        TamiyoPolicyConfig(**given)
    except TypeError as error:
        raise ConfigError(f"policy_options of policy 'tamiyo': {error}") from error
    if weights:
        path, digest = _weights(weights)
        open_gate = {**given, "uncertainty_threshold": 1.0, "novelty_threshold": 1.0}
        candidates = {**given.get("candidates", {}), "shortcut": False}
        arms |= {
            LEARNED: Learned(weights=path, digest=digest, options=given, scratch=True),
            NO_GATE: Learned(weights=path, digest=digest, options=open_gate),
            NO_SHORTCUT: Learned(
                weights=path, digest=digest, options={**given, "candidates": candidates, "fallback": "cond"}
            ),
        }
    if value_weights:
        path, digest = _weights(value_weights)
        arms[VALUE] = Learned(weights=path, digest=digest, options=given)
    if unknown := [name for name in only if name not in arms]:
        raise ConfigError(
            f"no arm {', '.join(unknown)}; with weights={weights!r} and value_weights={value_weights!r} arms are "
            f"{', '.join(arms)}"
        )
    return {name: arm for name, arm in arms.items() if not only or name in (NONE, *only)}


def _weights(path: str) -> tuple[str, str]:
    """The file, and a digest of what is in it."""
    file = shipped() if path == "shipped" else Path(path)
    if not file.is_file():
        raise CheckpointError(f"no policy network at {file}; pass the .safetensors file that training wrote")
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()[:24]
