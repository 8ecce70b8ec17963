"""What ``esper watch`` knows of a run, and how it looks."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path

import msgspec
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from esper.messages import (
    DecisionRecord,
    ErrorRecoveryEvent,
    Event,
    GovernorRecord,
    HealthSignal,
    KernelPerformance,
    Message,
    ModelPerformance,
    RunRecord,
    SignalBatch,
    TransitionRecord,
)
from esper.oona import Collector, RunInfo, find_runs

__all__ = ["RunView"]

_WIDE = 120  # columns of a terminal; below, the less telling figures are left out
_NUM_EVENTS = 10
_CHECK_ALIVE_S = 1.0
_LAST_WORDS_MS = 300  # a closing run's last messages may arrive after its descriptor has gone
_FIGURE_WIDTHS = {
    "variance": 8, "dead": 4, "dorm": 4, "expr": 7, "grad": 7, "update": 7,
    "snr": 7, "rank": 5, "corr": 5, "ms": 6,
}  # fmt: skip
_STAGE_STYLES = {
    "germinated": "cyan", "training": "blue", "blending": "magenta", "holding": "yellow",
    "fossilized": "green", "culled": "red", "embargoed": "dim red", "dormant": "dim",
}  # fmt: skip
_GONE = ("culled", "embargoed", "dormant")
_Note = DecisionRecord | TransitionRecord | GovernorRecord | ErrorRecoveryEvent | RunRecord


class RunView:
    """What is known of a run, and how it looks (a rich renderable).

    Args:
        run: which run.
        collector: reads the run's telemetry.

    Attributes:
        ended: how the run ended; empty while it goes on.
        fit_height: leave out the healthiest layers where the terminal is too low for all.
    """

    def __init__(self, run: RunInfo, collector: Collector) -> None:
        self.run = run
        self.ended = ""
        self.fit_height = False
        self._collector = collector
        self._performance: ModelPerformance | None = None
        self._kernel: KernelPerformance | None = None
        self._stages: dict[str, TransitionRecord] = {}
        self._scores: dict[str, float] = {}
        self._events: deque[_Note] = deque(maxlen=_NUM_EVENTS)
        self._new_lines: deque[Text] = deque(maxlen=1000)
        self._heard_at = self._checked_at = time.monotonic()

    @property
    def complete(self) -> bool:
        """Whether both a batch of signals and the run's figures have arrived."""
        return self._collector.latest is not None and self._performance is not None

    def read(self, wait_s: float) -> None:
        """Take what the run has sent, waiting up to ``wait_s`` seconds for a first message."""
        messages = self._collector.drain(int(1000 * wait_s))
        for _, message in messages:
            self.take(message)
        now = time.monotonic()
        if messages:
            self._heard_at = now
        elif now - self._checked_at > _CHECK_ALIVE_S:
            self._checked_at = now
            if self.run.pid and all(run.telemetry != self.run.telemetry for run in find_runs()):
                for _, message in self._collector.drain(_LAST_WORDS_MS):
                    self.take(message)
                self.ended = self.ended or "its process has closed the bus without saying how the run ended"

    def take(self, message: Message) -> None:
        """Note one message."""
        match message:
            case SignalBatch():
                for signal in message.signals:
                    if signal.expressivity > 0:  # 0 between decision points: keep the last score
                        self._scores[signal.layer_id] = signal.expressivity
            case ModelPerformance():
                self._performance = message
                self._new_lines.append(Text(_performance_line(message)))
            case KernelPerformance():
                self._kernel = message
            case RunRecord(event="end"):
                self.ended = "the run has ended"
                self._note(message)
            case TransitionRecord():
                self._stages[message.seed_id] = message
                self._note(message)
            case DecisionRecord() | GovernorRecord() | ErrorRecoveryEvent() | RunRecord():
                self._note(message)

    def lines(self) -> list[Text]:
        """Plain lines for what has happened since the last call."""
        lines = list(self._new_lines)
        self._new_lines.clear()
        if self.ended:
            lines.append(Text(f"{self.ended}; {self._counts()}"))
        return lines

    def _note(self, event: _Note) -> None:
        self._new_lines.append(Text(f"step {event.step}  ") + _event_text(event))
        if self._events and _is_wait(event) and _is_wait(self._events[-1]):
            self._events.pop()  # one line for a row of WAITs: they must not push the actions out
        self._events.append(event)

    def read_log(self) -> None:
        """Take the events of before the watcher came from ``growth.jsonl`` in the run's folder, if any."""
        path = Path(self.run.run_dir) / "growth.jsonl"
        if not self.run.run_dir or not path.is_file():
            return
        decoder = msgspec.json.Decoder(Event)
        for line in path.read_bytes().splitlines():
            try:
                self.take(decoder.decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue  # the last line may be half written; what is whole is shown
        self.ended = ""  # a resumed run's log holds the end of its earlier part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> list[RenderableType]:
        wide = options.max_width >= _WIDE
        summary = Panel(self._summary(), title=f"esper  {self.run.run_id}", title_align="left")
        events = Panel(self._decisions(), title="decisions", title_align="left")
        footer = Text(self._counts(), style="dim")
        if self.ended:
            footer = Text(f"{self.ended}   ", style="bold") + footer
        parts = (summary, events, footer)
        taken = sum(len(console.render_lines(part, options, pad=False)) for part in parts)
        room = max(4, console.height - taken - 2) if self.fit_height else len(self._rows())
        return [summary, self._layers(wide, options.max_width, room), events, footer]

    def _summary(self) -> RenderableType:
        model, kernel = self._performance, self._kernel
        if model is None:
            return Text("waiting for the first sampled step", style="dim")
        facts = [
            ("step", f"{model.step:,}/{model.total_steps:,}" if model.total_steps else f"{model.step:,}"),
            ("epoch", str(model.epoch)),
            ("train loss", _number(model.train_loss)),
            ("held-out loss", "-" if model.held_out_loss is None else _number(model.held_out_loss)),
            ("parameters", f"{model.num_parameters:,}"),
            ("FLOPs", _number(model.training_flops)),
            ("seeds", str(model.seeds_alive)),
        ]
        if kernel is not None:
            facts.append(("a step takes", f"{kernel.step_latency_ms:.1f} ms"))
            facts.append(("probes", f"{kernel.probe_latency_ms:.1f} ms"))
        return Columns(
            [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in facts], padding=(0, 3)
        )

    def _decisions(self) -> RenderableType:
        if not self._events:
            return Text("none yet", style="dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="dim")
        grid.add_column(overflow="fold")
        for event in self._events:
            grid.add_row(str(event.step), _event_text(event))
        return grid

    def _rows(self) -> list[HealthSignal]:
        """Signals of layers and living seeds, each layer followed by its seeds."""
        batch = self._collector.latest
        return _by_layer(
            [
                signal
                for signal in (batch.signals if batch is not None else [])
                if signal.seed_id not in self._stages or self._stages[signal.seed_id].target not in _GONE
            ]
        )

    def _layers(self, wide: bool, width: int, room: int) -> Table:
        table = Table(expand=True, box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        figures = ["variance", "dead", "dorm", "expr", "grad"]
        figures += ["snr", "update", "rank", "corr", "ms"] if wide else ["update"]
        bar_cells = 8 if wide else 5
        name_width = width - (bar_cells + 6) - sum(_FIGURE_WIDTHS[name] + 1 for name in figures) - 6
        table.add_column("layer / seed", no_wrap=True, width=name_width)
        table.add_column("health", no_wrap=True, width=bar_cells + 5)
        for name in figures:
            table.add_column(name, justify="right", no_wrap=True, width=_FIGURE_WIDTHS[name])
        table.add_column("seeds", justify="right", no_wrap=True)
        rows = self._rows()
        shown = _worst(rows, room)
        prefix = _common_prefix([signal.layer_id for signal in rows])
        for signal in shown:
            table.add_row(*self._row(signal, wide, bar_cells, prefix, name_width))
        if len(shown) < len(rows):
            table.add_row(Text(f"and {len(rows) - len(shown)} healthier", style="dim"))
        return table

    def _row(
        self, signal: HealthSignal, wide: bool, bar_cells: int, prefix: str, name_width: int
    ) -> list[RenderableType]:
        score = signal.expressivity or (0.0 if signal.seed_id else self._scores.get(signal.layer_id, 0.0))
        row: list[RenderableType] = [
            self._name(signal, prefix, name_width),
            _health_bar(signal.health_score, bar_cells),
            _number(signal.activation_variance),
            _ratio(signal.dead_neuron_ratio),
            _ratio(signal.dormancy),
            _number(score) if score else Text("·", style="dim"),
            _number(signal.gradient_norm),
        ]
        if wide:
            row.append(_number(signal.gradient_snr))
        row.append(_number(signal.update_ratio))
        if wide:
            row += [
                f"{signal.effective_rank:.1f}",
                f"{signal.avg_correlation:+.2f}",
                f"{signal.execution_latency:.2f}",
            ]
        seeds = f"{signal.active_seeds}/{signal.total_seeds}" if signal.total_seeds else "·"
        row.append("" if signal.seed_id else Text(seeds, style="" if signal.total_seeds else "dim"))
        return row

    def _name(self, signal: HealthSignal, prefix: str, width: int) -> Text:
        errors = Text(f" {signal.error_count}!", style="bold red") if signal.error_count else Text()
        if not signal.seed_id:
            return Text(_shorten(signal.layer_id, prefix, width - len(errors))) + errors
        known = self._stages.get(signal.seed_id)
        text = Text("└ ", style="dim")
        text.append(known.target if known else "seed", style=_STAGE_STYLES[known.target] if known else "")
        text.append(" ✓" if signal.is_ready_for_transition else "", style="green")
        text.append(f" {known.blueprint if known else signal.seed_id}", style="dim")
        return text + errors

    def _counts(self) -> str:
        stats = self._collector.subscriber.stats if self._collector.subscriber is not None else None
        assert stats is not None, "a watcher reads from the bus"
        rejected = ", ".join(f"{count} {kind}" for kind, count in sorted(stats.rejected.items()))
        silent_s = time.monotonic() - self._heard_at
        return (
            f"messages {stats.received:,}   missed {stats.missed:,}   "
            f"refused {rejected or 0}   last heard {silent_s:.0f} s ago"
        )


def _by_layer(signals: list[HealthSignal]) -> list[HealthSignal]:
    """Each layer followed by its seeds, layers in the order in which they came."""
    order: dict[str, list[HealthSignal]] = {}
    for signal in signals:
        rows = order.setdefault(signal.layer_id, [])
        rows.insert(0 if not signal.seed_id else len(rows), signal)
    return [signal for rows in order.values() for signal in rows]


def _performance_line(message: ModelPerformance) -> str:
    held_out = "" if message.held_out_loss is None else f"  held-out {_number(message.held_out_loss)}"
    return (
        f"step {message.step}/{message.total_steps}  epoch {message.epoch}  "
        f"loss {_number(message.train_loss)}{held_out}  parameters {message.num_parameters:,}  "
        f"seeds {message.seeds_alive}"
    )


def _event_text(event: _Note) -> Text:
    text = Text()
    match event:
        case DecisionRecord(decision=decision):
            style = "dim" if decision.action == "wait" else "bold green" if event.applied else "yellow"
            text.append(decision.action, style=style)
            if decision.site:
                size = f" x{decision.size}" if decision.size else ""
                text.append(f" {decision.blueprint}{size} at {decision.site}".replace("  ", " "))
            text.append(f"  refused: {event.refused}" if event.refused else "", style="yellow")
            text.append(f"  {decision.reason}", style="dim")
        case TransitionRecord():
            text.append(f"{event.source} → ", style="dim")
            text.append(event.target, style=_STAGE_STYLES[event.target])
            text.append(f" {event.blueprint} at {event.site}")
            text.append(f"  {event.reason}", style="dim")
        case GovernorRecord():
            text.append(f"governor: {event.action} {event.target}", style="bold red")
            text.append(f"  {event.reason}", style="dim")
        case ErrorRecoveryEvent():
            text.append(f"{event.kind} {event.layer_id}", style="red")
            text.append(f"  {event.detail}", style="dim")
        case RunRecord():
            text.append(f"run {event.event}", style="bold")
    return text


def _is_wait(event: _Note) -> bool:
    return isinstance(event, DecisionRecord) and event.decision.action == "wait"


def _worst(rows: list[HealthSignal], room: int) -> list[HealthSignal]:
    """The ``room`` least healthy rows, in their own order; a seed's row stays with its layer."""
    if len(rows) <= room:
        return rows
    layers: dict[str, list[HealthSignal]] = {}
    for signal in rows:
        layers.setdefault(signal.layer_id, []).append(signal)
    chosen: set[str] = set()
    left = room - 1  # one line says how many are left out
    for layer_id, members in sorted(layers.items(), key=lambda item: min(s.health_score for s in item[1])):
        if len(members) <= left:
            chosen.add(layer_id)
            left -= len(members)
    return [signal for signal in rows if signal.layer_id in chosen]


def _common_prefix(names: list[str]) -> str:
    """The dotted beginning that all names share."""
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0] + ".")
    return "".join(shared)


def _shorten(name: str, prefix: str, width: int) -> str:
    """A layer's name in ``width`` characters, without what all share and then without its middle."""
    if len(name) > width:
        name = "…" + name.removeprefix(prefix)
    if len(name) > width:
        head = (width - 1) // 2
        name = name[:head] + "…" + name[head + 1 - width :]
    return name


def _health_bar(score: float, num_cells: int) -> Text:
    style = "green" if score >= 0.6 else "yellow" if score >= 0.3 else "red"
    full = round(score * num_cells)
    bar = Text("█" * full, style=style)
    bar.append("░" * (num_cells - full), style="dim")
    bar.append(f" {score:.2f}", style=style)
    return bar


def _ratio(value: float) -> Text:
    return Text(f"{100 * value:.0f}%", style="red" if value > 0.5 else "yellow" if value > 0.3 else "")


def _number(value: float) -> str:
    """Three significant digits in at most eight characters."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    return (
        f"{value:.3g}"
        if 1e-3 <= abs(value) < 1e4
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    )
