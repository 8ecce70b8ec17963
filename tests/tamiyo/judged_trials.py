"""Trials with made-up numbers."""

from __future__ import annotations

from typing import Any

from esper.tamiyo.judging.trial import Trial


def trial(arm: str, host: int = 0, **fields: Any) -> Trial:
    """A sound run of digits host ``host``, unless ``fields`` say otherwise."""
    given = {
        "arm": arm,
        "view": "flops",
        "group": "fresh",
        "family": "digits_mlp",
        "host": f"digits_mlp/test/{host}",
        "shape": "random",
        "repeat": 0,
        "price": 0.1,
        "budget": 2.0,
        "planned_steps": 100,
        "total_steps": 100,
        "flops_ratio": 1.0,
        "test_loss": 1.0,
        "test_accuracy": 0.5,
        "held_out_loss": 1.0,
        "host_parameters": 100,
        "num_parameters": 100,
        "seconds": 2.0,
    }
    return Trial(**(given | fields))
