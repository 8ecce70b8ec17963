"""Rank 0's policy decides for all ranks; the others take part in what it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from esper.errors import EsperError
from esper.messages import Decision
from esper.tamiyo.ranks import Ranks
from esper.tamiyo.state import GrowthState

__all__ = ["decide_together"]

_ORDER = "an order of the policy"


def decide_together(
    ranks: Ranks, state: GrowthState, ask: Callable[[GrowthState], list[Decision]]
) -> list[Decision]:
    """Let rank 0 ask its policy, and give every rank the answer.

    A policy measures when it wants to, and it may keep a state, draw random numbers or ask a service:
    so it runs on rank 0 alone, and each measurement is an order that the others carry out with it.
    Afterwards the random numbers of growth stand on every rank where rank 0 left them.

    Args:
        ranks: More than one.
        state: The decision point; its measurements are collective.
        ask: Asks the policy. Called on rank 0 only.
    """
    if ranks.rank:
        return _serve(ranks, state)
    decisions = ask(
        dataclasses.replace(
            state,
            measure_held_out_loss=_announced(ranks, state, "measure_held_out_loss"),
            measure_saving=_announced(ranks, state, "measure_saving"),
            score=_announced(ranks, state, "score"),
        )
    )
    drawn = state.generator.get_state().numpy().tobytes()
    ranks.exchange(_ORDER, ["decided", [msgspec.to_builtins(decision) for decision in decisions], drawn])
    return decisions


def _announced(ranks: Ranks, state: GrowthState, name: str) -> Callable[..., Any]:
    """The measurement ``name``, which the other ranks are told of before it begins."""
    measure = getattr(state, name)

    def measure_together(*args: Any) -> Any:
        ranks.exchange(_ORDER, [name, list(args)])
        return measure(*args)

    return measure_together


def _serve(ranks: Ranks, state: GrowthState) -> list[Decision]:
    while True:
        order: list[Any] = ranks.exchange(_ORDER, None)[0]
        if order[0] == "decided":
            state.generator.set_state(torch.frombuffer(bytearray(order[2]), dtype=torch.uint8))
            return [msgspec.convert(decision, Decision) for decision in order[1]]
        try:
            getattr(state, order[0])(*order[1])
        except EsperError:
            continue  # rank 0 got the same error at the same place, and its policy knows what follows from it
