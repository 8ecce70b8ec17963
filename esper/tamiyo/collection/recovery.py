"""Error-recovery events as health signals, so that what went wrong is seen where layers are looked at."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection

import msgspec

from esper.messages import ErrorRecoveryEvent, HealthSignal

__all__ = ["ErrorRecoveryIntegration"]


class ErrorRecoveryIntegration:
    """Turns an event into a signal of the layer or seed that it was about.

    The signal repeats the last one of that layer or seed in the same run, with the event's step and time, one
    error, and health 0, as a signal with errors has. Where there was none before, all figures are 0. An event
    about the run as a whole (an empty ``layer_id``: a policy that failed) becomes no signal.
    """

    def signal(
        self,
        event: ErrorRecoveryEvent,
        known: Collection[tuple[str, str]],
        last: Callable[[str, str], HealthSignal | None],
    ) -> HealthSignal | None:
        """The signal of an event.

        Args:
            event: What happened.
            known: ``(layer_id, seed_id)`` of the same run that signals came of.
            last: ``last(layer_id, seed_id)`` gives the last signal of the same run, or None.

        Returns:
            A signal with ``error_count`` 1, or None where the event is about no layer.
        """
        owner = locate(event.layer_id, known)
        if owner is None:
            return None
        # a clock that gives no number must not make a signal that the bus would refuse
        timestamp = event.timestamp if math.isfinite(event.timestamp) else time.time()
        before = last(*owner)
        if before is None:
            before = HealthSignal(
                *owner, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False, 0.0, 0.0, 0, 0, 0, 0.0
            )
        return msgspec.structs.replace(
            before,
            step=event.step,
            error_count=1,
            health_score=0.0,
            is_ready_for_transition=False,
            timestamp=timestamp,
        )


def locate(name: str, known: Collection[tuple[str, str]]) -> tuple[str, str] | None:
    """``(layer_id, seed_id)`` of what an event names: a layer, a seed, or a site (its target layer).

    Args:
        name: As in ``ErrorRecoveryEvent.layer_id``; the governor puts seed ids and site names there.
        known: Layers and seeds of the run.

    Returns:
        None for the empty name.
    """
    if not name:
        return None
    if (name, "") in known:
        return name, ""
    for layer_id, seed_id in known:
        if seed_id == name:
            return layer_id, seed_id
    kind, separator, rest = name.partition(":")
    if separator and kind in ("parallel", "bypass", "stack"):  # as esper.kasmina.sites.site_name writes it
        return rest.rpartition("->")[2], ""
    return name, ""
