"""One plain sentence for each event, for the live display, ``esper watch`` and logs."""

from __future__ import annotations

from collections.abc import Mapping

from esper.messages import DecisionRecord, Event, GovernorRecord, Stage, TransitionRecord
from esper.report.units import number

__all__ = ["Sentence", "describe", "one_line", "sentence"]

_VERBS: dict[Stage, str] = {
    "germinated": "germinated",
    "training": "training",
    "blending": "blending",
    "holding": "holding",
    "fossilized": "fossilised",
    "culled": "culled",
    "embargoed": "resting",
    "dormant": "free again",
}
_GOVERNOR_VERBS = {
    "cull": "culled",
    "rollback": "rolled back",
    "embargo": "embargoed",
    "halt_growth": "stopped growing",
}

Sentence = tuple[str, str]
"""A verb and the rest of the sentence."""


def describe(event: Event) -> str:
    """Return what happened, and why, on one printable line.

    Example:
        ``germinated widen(16) at bypass:layers.1->layers.2 — score 3.1 against floor 1.2``
    """
    verb, rest = sentence(event)
    return f"{verb} {rest}".rstrip()


def sentence(event: Event) -> Sentence:
    """Return :func:`describe` in two parts, so that a display can set the verb apart."""
    if isinstance(event, DecisionRecord):
        verb, rest = _decision(event)
    elif isinstance(event, TransitionRecord):
        where = f"{event.blueprint} at {event.site}"
        if event.target in ("embargoed", "dormant"):
            where = event.site
        verb, rest = _VERBS[event.target], where + _why(event.reason, event.measurements)
    elif isinstance(event, GovernorRecord):
        target = f"{event.target} " if event.target else ""
        verb, rest = (
            _GOVERNOR_VERBS[event.action],
            f"{target}(governor)" + _why(event.reason, event.measurements),
        )
    elif event.event == "note" and "sites" in event.info:
        refused = event.info.get("refused") or {}
        left_out = f"; {len(refused)} layers left out" if refused else ""
        verb, rest = "traced", f"the host: seeds can attach at {len(event.info['sites'])} sites{left_out}"
    else:
        facts = [
            f"{key} {value}" for key, value in event.info.items() if isinstance(value, str | int | float)
        ]
        verb = {"start": "started", "resume": "resumed", "end": "ended", "note": "note"}[event.event]
        rest = ", ".join(facts)
    return one_line(verb), one_line(rest)


def one_line(text: str) -> str:
    """Return ``text`` on one line with every unprintable character (also a terminal's escape) as a space.

    Names and reasons come from users' modules and over the bus: they shall not steer a terminal.
    """
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _decision(event: DecisionRecord) -> Sentence:
    decision = event.decision
    blueprint = decision.blueprint + (f"({decision.size})" if decision.size else "")
    what = {
        "wait": "",
        "germinate": f"{blueprint} at {decision.site}",
        "cull": decision.site,
        "recycle": f"dormant units of {decision.site}",
        "hold": decision.site,
    }[decision.action]
    why = _why(decision.reason, decision.numbers)
    if decision.action == "wait":
        return ("restarts" if event.applied else "waits"), why.removeprefix(" — ")
    if not event.applied:
        refused = event.refused or "no reason given"
        return (
            "refused",
            f"to {decision.action} {what} — {refused} (wanted because: {decision.reason or '?'})",
        )
    done = {"germinate": "germinated", "cull": "culled", "recycle": "recycled", "hold": "held"}
    return done[decision.action], what + why


def _why(reason: str, numbers: Mapping[str, float]) -> str:
    """Give the reason; numbers too when the reason states none, the score and its floor before others."""
    if any(char.isdigit() for char in reason) or not numbers:
        return f" — {reason}" if reason else ""
    if "score" in numbers and "floor" in numbers:
        figures = f"score {number(numbers['score'])} against floor {number(numbers['floor'])}"
    else:
        figures = ", ".join(f"{key} {number(value)}" for key, value in list(numbers.items())[:3])
    return f" — {reason} ({figures})" if reason else f" — {figures}"
