"""``esper watch``: follow a running training from another terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from esper.errors import ConfigError, EsperError
from esper.oona import Collector, RunInfo, Subscriber, find_runs
from esper.oona.config import check_address
from esper.watch_view import RunView

__all__ = ["pick_run", "watch"]


def watch(
    target: str | None = None,
    *,
    keys: str = "",
    once: bool = False,
    interval_s: float = 0.25,
    wait_s: float = 30.0,
    console: Console | None = None,
) -> int:
    """Show a run until it ends or Ctrl-C.

    On a terminal a live table; elsewhere one plain line an event and a sampled step.

    Args:
        target: a run's id or its beginning, or an ``ipc://`` or ``tcp://`` address; default the newest run
            on this machine.
        keys: folder of CURVE keys, for an address that wants them.
        once: print the first complete picture and return.
        interval_s: time between two refreshes, in seconds.
        wait_s: with ``once``, how long to wait for the picture, in seconds.
        console: where to print; default standard output.

    Returns:
        Exit status: 0, or 1 when no such run was found or it said nothing within ``wait_s``.
    """
    console = console if console is not None else Console()
    try:
        run, note = pick_run(target, keys)
    except EsperError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    if note:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
    with Subscriber(run) as subscriber:
        view = RunView(run, Collector(subscriber))
        view.read_log()
        try:
            if once:
                return _show_once(view, console, wait_s)
            if console.is_terminal:
                view.fit_height = True
                with Live(view, console=console, refresh_per_second=1 / interval_s):
                    _follow(view, interval_s)
            else:
                for line in view.lines():
                    console.print(line, soft_wrap=True, highlight=False)
                _follow(view, interval_s, console)
        except KeyboardInterrupt:
            console.print("stopped watching; the run goes on", style="dim")
    return 0


def pick_run(target: str | None, keys: str = "") -> tuple[RunInfo, str]:
    """The run to watch, and a remark when there was a choice.

    Args:
        target: as in :func:`watch`.
        keys: as in :func:`watch`.

    Raises:
        ConfigError: no run, none or several that the target names (the text lists what runs), or an
            address that is wrong, or beyond loopback without keys.
    """
    runs = [run for run in find_runs() if run.telemetry]
    if target and "://" in target:
        check_address(target, to_bind=False, keys=keys)
        # an address may be one that this machine announces; then more is known of the run
        known = [run for run in runs if run.telemetry == target]
        unknown = RunInfo(run_id=target, pid=0, started=0.0, telemetry=target, keys=keys)
        return known[0] if known else unknown, ""
    listing = ", ".join(f"{run.run_id} (pid {run.pid})" for run in runs)
    if not runs:
        raise ConfigError(
            f"expected a running training{f' {target!r}' if target else ''}, found none on this machine for "
            "this user: start one with `esper train`, or give the address of one (bus.transport=tcp)"
        )
    if not target:
        others = f"watching the newest of {len(runs)} runs: {listing}" if len(runs) > 1 else ""
        return runs[0], others
    matches = [run for run in runs if run.run_id == target] or [
        run for run in runs if run.run_id.startswith(target)
    ]
    if len(matches) == 1:
        return matches[0], ""
    found = "none" if not matches else f"{len(matches)}"
    raise ConfigError(f"expected one running training named {target!r}, found {found}; running: {listing}")


def _follow(view: RunView, interval_s: float, lines_to: Console | None = None) -> None:
    """Read until the run ends or its process is gone."""
    while not view.ended:
        view.read(interval_s)
        if lines_to is not None:
            for line in view.lines():
                lines_to.print(line, soft_wrap=True, highlight=False)


def _show_once(view: RunView, console: Console, wait_s: float) -> int:
    deadline = time.monotonic() + wait_s
    while not view.complete and not view.ended and time.monotonic() < deadline:
        view.read(0.1)
    console.print(view)
    if view.complete or view.ended:
        return 0
    console.print(f"the run sent no complete picture within {wait_s:g} s", style="red")
    return 1
