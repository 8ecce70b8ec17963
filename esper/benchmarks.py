"""``esper bench``: find a benchmark by name, run it, and print its figures beside their targets.

A benchmark is a module of :mod:`esper.bench` with ``TITLE: str``, ``TARGETS: dict[str, tuple[str, float]]``
(figure name -> comparison and bound) and ``run(**options) -> dict[str, float]``.
"""

from __future__ import annotations

import inspect
import json
import math
import operator
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from esper.errors import ConfigError

__all__ = ["bench", "find_benchmarks", "key_values", "read_options"]

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def bench(
    name: str | None,
    *,
    as_json: bool = False,
    seeds: int | None = None,
    quick: bool = False,
    settings: Sequence[str] = (),
) -> int:
    """Run one benchmark and print its figures, or list all when ``name`` is None.

    Args:
        name: Module name below ``esper.bench``.
        as_json: Print one flat object, figure name -> number; a figure that is not finite is null.
        seeds: Passed as ``seeds`` to a benchmark that has this option.
        quick: Passed as ``quick`` to a benchmark that has this option.
        settings: Further options as ``key=value``.

    Returns:
        Exit status 0: whether targets are met is in the table, not in the status.

    Raises:
        ConfigError: No such benchmark, or an option that it does not have.
    """
    if name is None:
        for found in find_benchmarks():
            print(f"{found:<10} {_module(found).TITLE}")
        return 0
    module = _module(name)
    given: dict[str, Any] = {}
    if seeds is not None:
        given["seeds"] = seeds
    if quick:
        given["quick"] = True
    figures = module.run(**read_options(module.run, name, given, settings))
    if as_json:
        plain = {key: float(value) if math.isfinite(value) else None for key, value in figures.items()}
        print(json.dumps(plain, indent=2))
    else:
        _print_table(module.TITLE, figures, module.TARGETS)
    return 0


def find_benchmarks() -> list[str]:
    """Return the names of the modules of :mod:`esper.bench` that are benchmarks."""
    package = import_module("esper.bench")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [name for name in names if _is_benchmark(import_module(f"esper.bench.{name}"))]


def read_options(
    run: Callable[..., Any], name: str, given: Mapping[str, Any], settings: Sequence[str]
) -> dict[str, Any]:
    """Return the keyword arguments for ``run``.

    Args:
        run: The benchmark's function; its signature says which options there are.
        name: Of the benchmark, for the error.
        given: Options that are values already.
        settings: Options as ``key=value``; a value is JSON, or a string where it is not.

    Raises:
        ConfigError: An option that ``run`` does not take, or one without ``=``.
    """
    options = {**given, **key_values(settings)}
    known = {p.name: p for p in inspect.signature(run).parameters.values()}
    if unknown := sorted(set(options) - set(known)):
        described = ", ".join(f"{p.name}={p.default!r}" for p in known.values()) or "none"
        raise ConfigError(f"benchmark {name!r} has the options: {described}; got also {unknown}")
    return options


def key_values(settings: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Read ``key=value`` texts; a value is JSON, or a string where it is not.

    Raises:
        ConfigError: One without ``=``.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"{option} expects KEY=VALUE, got {setting!r}")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def _module(name: str) -> ModuleType:
    names = find_benchmarks()
    if name not in names:
        raise ConfigError(f"there is no benchmark {name!r}; there are {', '.join(names)}")
    return import_module(f"esper.bench.{name}")


def _is_benchmark(module: ModuleType) -> bool:
    return all(hasattr(module, part) for part in ("TITLE", "TARGETS", "run"))


def _print_table(title: str, figures: Mapping[str, float], targets: Mapping[str, tuple[str, float]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("target", justify="right")
    table.add_column("met")
    for name, value in figures.items():
        comparison, bound = targets.get(name, ("", math.nan))
        met = ""
        if comparison:
            met = "[green]yes[/]" if _COMPARISONS[comparison](value, bound) else "[red]no[/]"
        table.add_row(name, f"{value:,.4g}", f"{comparison} {bound:,.4g}" if comparison else "", met)
    console = Console(highlight=False)
    console.print(table)
    if missing := sorted(set(targets) - set(figures)):
        console.print(f"no figure for the targets: {', '.join(missing)}", style="yellow")
