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
    """Peak rate of AdamW for a host: ``exp(intercept + slope · log(num_parameters))``.

    Parameters and rates beyond those that were tried count as the last that were.

    Raises:
        ConfigError: The family was not tuned.
    """
    families = load_rules()["families"]
    if family not in families:
        raise ConfigError(
            f"no learning rate is known for family {family!r}; tuned are {', '.join(families)}; run "
            "`python -m esper.tamiyo.environment.tune_rates`"
        )
    rule = families[family]
    smallest, largest = rule["parameters"][0], rule["parameters"][-1]
    size = min(max(num_parameters, smallest), largest)
    rate = math.exp(rule["intercept"] + rule["slope"] * math.log(size))
    return float(min(max(rate, rule["rates"][0]), rule["rates"][-1]))
