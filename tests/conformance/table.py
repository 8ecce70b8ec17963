"""The table of hosts for README: what :mod:`hosts` declares, which the tests next to it assert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hosts import HOSTS, HostCase

__all__ = ["HostRow", "host_rows", "markdown"]

_CHECKED = (
    "With every blueprint of a row growth keeps the host's function within 1e-6 in training and evaluation, is seen "
    "by evaluation, lets no sample see another, and exports within 1e-5; in a Lightning fit the one in bold trains, "
    "fossilises, and resumes bit for bit in the middle of an epoch and of growth."
)


class HostRow(NamedTuple):
    """One row of the table; plain text and markdown.

    Attributes:
        host: Library and model.
        grows: Kinds of sites with the blueprints that fit there.
        exports: What ``esper.export`` gives.
        left_alone: Examples of layers without a site, and why.
    """

    host: str
    grows: str
    exports: str
    left_alone: str


def host_rows() -> list[HostRow]:
    """A row for every host of the suite, in its order."""
    return [
        HostRow(f"{case.library} {case.model}", _grows(case), _exports(case), _left_alone(case))
        for case in HOSTS
    ]


def markdown(rows: Sequence[HostRow] | None = None) -> str:
    """The rows as a markdown table under one line that says what was checked."""
    lines = [
        _CHECKED,
        "",
        "| host | grows | exports as | left alone, because it is |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows or host_rows()])


def _grows(case: HostCase) -> str:
    where, trained = case.fit[0].partition(":")[0], case.fit[1]
    text = "; ".join(
        f"{kind}: {', '.join(f'**{name}**' if (kind, name) == (where, trained) else name for name in names)}"
        for kind, names in case.grows.items()
    )
    return f"{text}; `generate` with and without cache agrees" if case.generates else text


def _exports(case: HostCase) -> str:
    graph = sorted({name for names in case.grows.values() for name in names if name in case.as_graph})
    if not graph:
        return "its own class"
    return (
        "a torch graph"
        if len(graph) == _count(case)
        else f"its own class; with {', '.join(graph)} a torch graph"
    )


def _count(case: HostCase) -> int:
    return len({name for names in case.grows.values() for name in names})


def _left_alone(case: HostCase) -> str:
    return "; ".join(f"`{layer}`: {reason}" for layer, reason in case.left_alone.items()) or "nothing"
