"""Which layers have fallen asleep: the part of a policy that recycles units instead of adding them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from esper.kasmina.activations import is_elementwise
from esper.messages import Decision, HealthSignal

if TYPE_CHECKING:
    from esper.kasmina.topology import ModelTopology
    from esper.tamiyo.state import GrowthState

__all__ = ["Recycler", "recyclable"]

_DENSE = ("Linear", "Conv2d")


class Recycler:
    """Asks for a layer's dormant units to be recycled, not too often.

    Growth does not bring back plasticity; recycling does, and dormancy is the signal that leads
    (GROWTH.md §9: above .30 recycling was never harmful in five settings).

    A layer whose fresh units are asleep again when it is next measured does not need them: each such
    recycling in a row doubles its cooldown.

    Args:
        policy: Name for the decisions.
        threshold: Dormancy above which a layer is recycled.
        cooldown_steps: Optimizer steps between two recyclings of one layer.
    """

    def __init__(self, policy: str, threshold: float, cooldown_steps: int) -> None:
        self.policy = policy
        self.threshold = threshold
        self.cooldown_steps = cooldown_steps
        self._last: dict[str, int] = {}
        self._in_vain: dict[str, int] = {}
        self._judged: dict[str, int] = {}

    def decide(self, state: GrowthState) -> list[Decision]:
        """One decision for each layer that is dormant, rested, and measured since it was last recycled."""
        decisions = []
        grown_from = {seed.site for seed in state.seeds}
        read_by_seeds = {view.site.source for view in state.sites if view.site.name in grown_from}
        for layer in state.topology.layer_names:
            signal = state.health.get(layer)
            if signal is None:
                continue
            self._judge(layer, signal)
            if not self._asleep(signal) or not recyclable(state.topology, layer, read_by_seeds):
                continue
            last = self._last.get(layer)
            cooldown_steps = self.cooldown_steps * 2 ** self._in_vain.get(layer, 0)
            if last is not None and (state.step - last < cooldown_steps or signal.step <= last):
                continue
            self._last[layer] = state.step
            decisions.append(
                Decision(
                    action="recycle",
                    reason=f"{signal.dormancy:.0%} of the units of {layer} are dormant, more than {self.threshold:.0%}",
                    policy=self.policy,
                    site=layer,
                    urgency=signal.dormancy,
                    numbers={
                        "dormancy": signal.dormancy,
                        "threshold": self.threshold,
                        "dead_neuron_ratio": signal.dead_neuron_ratio,
                        "effective_rank": signal.effective_rank,
                        "measured_at_step": signal.step,
                        "in_vain": self._in_vain.get(layer, 0),
                    },
                )
            )
        return decisions

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"last": dict(self._last), "in_vain": dict(self._in_vain), "judged": dict(self._judged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._last = dict(state["last"])
        self._in_vain = dict(state["in_vain"])
        self._judged = dict(state["judged"])

    def _asleep(self, signal: HealthSignal) -> bool:
        # 3 of 10 units are not more than .3, whatever rounding makes of the quotient.
        return signal.dormancy > self.threshold + 1e-6

    def _judge(self, layer: str, signal: HealthSignal) -> None:
        """At the first measurement after a recycling: did the fresh units stay awake?"""
        last = self._last.get(layer)
        if last is None or signal.step <= last or self._judged.get(layer) == last:
            return
        self._judged[layer] = last
        self._in_vain[layer] = self._in_vain.get(layer, 0) + 1 if self._asleep(signal) else 0


def recyclable(topology: ModelTopology, name: str, read_by_seeds: Set[str]) -> bool:
    """Whether all that reads the layer's units are dense layers of its kind behind element-wise operations.

    What :func:`esper.kasmina.renewal.recyclable` asks of the live model, as far as a state can tell: a
    layer that it would refuse is better not asked for at every decision point.
    """
    layer, edges = topology.layer(name), topology.consumers(name)
    if layer.type not in _DENSE or layer.is_output or layer.num_calls != 1 or not edges:
        return False
    return all(
        topology.layer(edge.target).type == layer.type
        and all(is_elementwise(op) for op in edge.ops)
        and len(topology.producers(edge.target)) == 1
        and edge.target not in read_by_seeds
        for edge in edges
    )
