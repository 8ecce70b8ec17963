"""What the doctor found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esper.report import units
from esper.report.events import one_line

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

__all__ = ["checkup_tables"]

_KINDS = {
    "parallel": "Beside a layer (parallel)",
    "bypass": "Around a layer's non-linearity, or several (bypass)",
    "stack": "After a block, a further one (stack)",
}
_ROWS = 40
"""Rows of a table; more are counted."""


def checkup_tables(found: Mapping[str, Any], *, rows: int = _ROWS) -> Group:
    """Lay out a check-up.

    Args:
        found: As :meth:`esper.callbacks.doctor.Checkup.as_dict` gives it.
        rows: Most rows of a table.
    """
    from rich.console import Group
    from rich.text import Text

    sites, refused, conflicts = found["sites"], found["refused"], found["conflicts"]
    parts: list[RenderableType] = [Text(found["model"], style="bold"), Text(_costs(found)), Text("")]
    if sites:
        for kind, title in _KINDS.items():
            of_kind = [site for site in sites if site["kind"] == kind]
            if of_kind:
                parts += _with_rest(_site_table(title, of_kind[:rows]), len(of_kind) - rows)
    else:
        parts.append(Text("Nothing can grow in this model.\n", style="red"))
    if refused:
        parts += _with_rest(_refused_table(list(refused.items())[:rows]), len(refused) - rows)
    for place, why in found["faults"].items():
        parts.append(Text(f"Blueprint {place} cannot be built: {one_line(why)}", style="yellow"))
    for conflict in conflicts:
        parts.append(_conflict(conflict))
    for note in found["notes"]:
        parts.append(Text(f"Note: {one_line(note)}"))
    parts.append(_verdict(found))
    return Group(*parts)


def _site_table(title: str, sites: Sequence[Mapping[str, Any]]) -> Table:
    from rich.text import Text

    table = _table(title, "site", "blueprints")
    for column, justify in zip(("usual", "params", "FLOPs", "cheapest", "params"), "lrrlr", strict=True):
        table.add_column(column, justify="right" if justify == "r" else "left", no_wrap=True)
    for site in sites:
        usual, cheapest = site["usual"], site["cheapest"]
        cells = (
            site["site"].partition(":")[2], ", ".join(site["blueprints"]),
            _seed(usual), units.scaled(usual["parameters"]), units.scaled(usual["flops"]),
            _seed(cheapest), units.scaled(cheapest["parameters"]),
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def _refused_table(refused: Sequence[tuple[str, str]]) -> Table:
    from rich.text import Text

    table = _table("Layers that cannot grow", "layer", "because it is")
    for layer, why in refused:
        table.add_row(Text(layer), Text(one_line(why)))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _with_rest(table: Table, rest: int) -> list[RenderableType]:
    from rich.text import Text

    return [table, Text(f"... and {rest} more; --json lists all\n")] if rest > 0 else [table]


def _seed(price: Mapping[str, Any]) -> str:
    return f"{price['blueprint']} {price['size']}"


def _costs(found: Mapping[str, Any]) -> str:
    host, budget = found["host"], found["budget"]
    ratio = budget["max_flops_ratio"]
    limit = (
        "without a limit on FLOPs"
        if ratio is None
        else f"and {ratio:g} times the host's training FLOPs in all"
    )
    frozen = host["trained_parameters"] < host["parameters"]
    trained = f" ({units.scaled(host['trained_parameters'])} of them trained)" if frozen else ""
    least, most = budget["forward_flops_least"], budget["forward_flops_most"]
    return (
        f"Host: {units.scaled(host['parameters'])} parameters{trained}, {units.scaled(host['forward_flops'])} FLOPs a "
        f"sample and forward pass.\nBudget: growth may add {units.scaled(budget['parameters_allowed'])} parameters "
        f"(max_parameters_ratio={budget['max_parameters_ratio']:g}), {limit}; they add {units.scaled(least)} to "
        f"{units.scaled(most)} FLOPs, depending on where they go."
    )


def _conflict(conflict: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    refused = conflict["kind"] == "refused"
    label = Text("Conflict: " if refused else "Warning: ", style="bold red" if refused else "bold yellow")
    return label + Text(
        f"{one_line(conflict['what'])}\n    {one_line(conflict['why'])}\n    {one_line(conflict['way_out'])}"
    )


def _verdict(found: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    refused = sum(conflict["kind"] == "refused" for conflict in found["conflicts"])
    layers = len({site["target"] for site in found["sites"]})
    text = f"Can grow: {_number(layers, 'layer')} at {_number(len(found['sites']), 'site')}. "
    text += f"Cannot: {_number(len(found['refused']), 'layer')}. {_number(refused, 'conflict').capitalize()}."
    return Text(text, style="bold green" if found["healthy"] else "bold red")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
