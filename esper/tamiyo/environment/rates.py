"""Learning rates of hosts: a rule for each family, tuned on its validation split (``tune_rates.py``)."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib import resources
from typing import Any

from esper.errors import ConfigError

__all__ = ["learning_rate", "load_rules"]


@lru_cache(maxsize=1)
def load_rules() -> dict[str, Any]:
    """The rules and the figures that they were made from: ``rates.json``."""
    text = resources.files("esper.tamiyo.environment").joinpath("rates.json").read_text(encoding="utf-8")
    rules: dict[str, Any] = json.loads(text)
    return rules


def learning_rate(family: str, num_parameters: int) -> float:
    """Peak rate of AdamW for a host: ``exp(intercept + slope · log(num_parameters))``, within what was tried.

    Raises:
        ConfigError: The family was not tuned.
    """
    rules = load_rules()
    if family not in rules["families"]:
        raise ConfigError(
            f"no learning rate is known for family {family!r}; tuned are {', '.join(rules['families'])}; run "
            "`python -m esper.tamiyo.environment.tune_rates`"
        )
    rule = rules["families"][family]
    rate = math.exp(rule["intercept"] + rule["slope"] * math.log(num_parameters))
    return float(min(max(rate, rules["grid"][0]), rules["grid"][-1]))
