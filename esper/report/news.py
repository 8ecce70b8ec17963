"""Which events are worth telling, and in what order: each birth and death once, by its fullest account."""

from __future__ import annotations

from collections.abc import Iterable

from esper.messages import DecisionRecord, Event, GovernorRecord, TransitionRecord

__all__ = ["NewsFilter", "is_wait"]


def is_wait(event: Event) -> bool:
    """Whether ``event`` is a decision to do nothing: many, and each of little interest."""
    return isinstance(event, DecisionRecord) and event.decision.action == "wait" and not event.applied


class NewsFilter:
    """Takes a run's events one by one and gives back those to tell.

    Left out are decisions to wait, the end of a site's rest, and a second account of one germination or cull
    (it stands in the records as decision or intervention, and as transition). The decision that made a seed
    is written *after* the seed's first transitions; as it knows size and score, these wait and follow it.
    """

    def __init__(self) -> None:
        self._told: set[tuple[int, str, str]] = set()
        self._birth: list[TransitionRecord] = []  # of one seed in one step, its germination first

    def feed(self, event: Event) -> list[Event]:
        """Take the next event; return what is to be told now."""
        if self._birth and isinstance(event, TransitionRecord | DecisionRecord):
            first = self._birth[0]
            if (event.step, event.seed_id) == (first.step, first.seed_id):
                if isinstance(event, TransitionRecord):
                    self._birth.append(event)
                    return []
                later, self._birth = self._birth[1:], []
                return self._new([event, *later])
        told = self.flush()
        if isinstance(event, TransitionRecord) and event.target == "germinated":
            self._birth = [event]
            return told
        return told + self._new([event])

    def flush(self) -> list[Event]:
        """Return what was kept waiting for a decision that did not come (a seed grown by hand has none)."""
        waiting, self._birth = self._birth, []
        return self._new(waiting)

    def _new(self, events: Iterable[Event]) -> list[Event]:
        return [event for event in events if self._is_news(event)]

    def _is_news(self, event: Event) -> bool:
        if is_wait(event) or (
            isinstance(event, TransitionRecord) and event.target in ("embargoed", "dormant")
        ):
            return False
        seed, what = "", ""
        if isinstance(event, DecisionRecord) and event.applied:
            what = {"germinate": "germinated", "cull": "culled"}.get(event.decision.action, "")
            seed = event.seed_id or event.decision.site  # of a cull the site is the seed
        elif isinstance(event, TransitionRecord):
            seed, what = event.seed_id, event.target
        elif isinstance(event, GovernorRecord) and event.action == "cull":
            seed, what = event.target, "culled"
        if not (seed and what):
            return True
        key = (event.step, seed, what)
        is_news = key not in self._told
        self._told.add(key)
        return is_news
