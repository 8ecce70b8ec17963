"""What the terminal shows while a run trains: a line of progress, and events as they happen, in words.

On a terminal the last two lines are redrawn (a bar with losses, a line on the seeds) and events scroll away
above them. Elsewhere (a file, a pipe, a notebook) there are only plain lines: one an event, one for each
tenth of the epochs. No thread draws: drawing happens inside the calls, ten times a second at most.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from esper.messages import DecisionRecord, Event, Stage, TransitionRecord
from esper.report import units
from esper.report.events import describe, one_line, sentence
from esper.report.history import GONE
from esper.report.metrics import Role, find_metric
from esper.report.news import NewsFilter, is_wait
from esper.report.summary import ArmSummary

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

__all__ = ["LiveDisplay"]

_log = logging.getLogger(__name__)

REDRAW_INTERVAL_S = 0.1
PLAIN_LINES = 10  # progress lines of one arm without a terminal
FIGURES: tuple[tuple[Role, str, Callable[[float | None], str]], ...] = (
    ("train_loss", "train", units.loss),
    ("val_loss", "val", units.loss),
    ("val_acc", "acc", units.percent),
)
VERB_STYLES = {
    "germinated": "bold blue",
    "blending": "yellow",
    "holding": "cyan",
    "fossilised": "bold green",
    "culled": "bold red",
    "rolled back": "bold red",
    "refused": "magenta",
}


class LiveDisplay:
    """Shows a run of one or several arms; as a context manager it puts the terminal right after an error.

    Training must not fail because of its display: when the output is gone (a closed pipe), the display logs
    that once and is silent from then on.

    Args:
        console: where to draw; by default rich's for the standard output.

    Example:
        >>> with LiveDisplay() as display:
        ...     display.arm_started("growth", total_epochs=40, total_steps=1800)
        ...     display.step(1)
        ...     display.event(event)
        ...     display.epoch_ended(0, 45, {"train_loss": 1.9, "val_loss": 1.7})
        ...     display.arm_ended(summary)
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = Console(highlight=False) if console is None else console
        self._live: Live | None = None
        self._silent = False
        self._drawn_at = 0.0
        self._first_step: int | None = None
        self._news = NewsFilter()
        self._reset("", 0, 0)

    def arm_started(self, name: str, total_epochs: int, total_steps: int) -> None:
        """Begin an arm; 0 where a total is not known."""
        self._reset(one_line(name), max(total_epochs, 0), max(total_steps, 0))
        if self._console.is_terminal:
            self._start_live()
        else:
            self._print(f"{self._name}  starts: {self._total_epochs} epochs, {self._total_steps} steps")

    def step(self, step: int) -> None:
        """Note that optimizer step ``step`` is done; cheap enough to call on every batch."""
        self._tell(self._news.flush())
        if self._first_step is None:
            self._first_step = step - 1  # a resumed arm does not begin at 0
        self._step = step
        if self._live is not None and time.monotonic() - self._drawn_at >= REDRAW_INTERVAL_S:
            self._redraw()

    def epoch_ended(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Note the end of ``epoch`` (counted from 0) with its metrics, under any of the usual names."""
        self._tell(self._news.flush())
        self._epoch, self._step = epoch + 1, step
        self._metrics.update(metrics)
        if self._live is not None:
            self._redraw()
            return
        tenth = -(-self._total_epochs // PLAIN_LINES) or 1
        if self._epoch % tenth == 0 or self._epoch == self._total_epochs:
            self._print(
                "  ".join(filter(None, (self._name, self._position(), *self._figures(), self._seeds())))
            )

    def event(self, event: Event) -> None:
        """Say what happened. WAIT decisions are only counted; what says the same again is left out."""
        if isinstance(event, DecisionRecord) and is_wait(event):
            self._waits += 1
            self._wait_reason = one_line(event.decision.reason)
        if isinstance(event, TransitionRecord):
            self._stages[event.seed_id] = event.target
        self._tell(self._news.feed(event))

    def arm_ended(self, summary: ArmSummary) -> None:
        """Close the arm with one line of results."""
        self._tell(self._news.flush())
        self._stop_live()
        facts = [
            f"accuracy {units.percent(summary.accuracy)}" if summary.accuracy is not None else "",
            f"loss {units.loss(summary.loss)}" if summary.loss is not None else "",
            f"{units.count(summary.parameters)} parameters",
            units.duration(summary.wall_time_s) if summary.wall_time_s is not None else "",
            self._waits_text(),
        ]
        self._print(f"{one_line(summary.name)}  done: {', '.join(filter(None, facts))}", style="bold")

    def close(self) -> None:
        """Give the terminal back; closing twice is fine."""
        self._tell(self._news.flush())
        self._stop_live()

    def __enter__(self) -> LiveDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _reset(self, name: str, total_epochs: int, total_steps: int) -> None:
        self._stop_live()
        self._name, self._total_epochs, self._total_steps = name, total_epochs, total_steps
        self._epoch = self._step = self._waits = 0
        self._first_step = None
        self._news = NewsFilter()
        self._wait_reason = ""
        self._metrics: dict[str, float] = {}
        self._stages: dict[str, Stage] = {}
        self._started_at = time.monotonic()
        self._drawn_at = 0.0

    # What to say

    def _position(self) -> str:
        total_epochs = f"/{self._total_epochs}" if self._total_epochs else ""
        return f"epoch {self._epoch}{total_epochs}  step {self._step}"

    def _figures(self) -> list[str]:
        figures = []
        for role, name, form in FIGURES:
            found = find_metric(self._metrics, role)
            if found is not None:
                figures.append(f"{name} {form(float(self._metrics[found]))}")
        return figures

    def _seeds(self) -> str:
        alive: dict[str, int] = {}
        for stage in self._stages.values():
            if stage not in GONE:
                alive[stage] = alive.get(stage, 0) + 1
        counts = ", ".join(f"{count} {stage.replace('z', 's')}" for stage, count in alive.items())
        return f"seeds: {counts}" if counts else ""

    def _waits_text(self) -> str:
        return f"waited {self._waits} time{'s' if self._waits != 1 else ''}" if self._waits else ""

    # How to draw it

    def _tell(self, events: Iterable[Event]) -> None:
        for event in events:
            self._print_event(event)

    def _print_event(self, event: Event) -> None:
        from rich.text import Text

        if not self._console.is_terminal:
            self._print(f"step {event.step}  {describe(event)}")
            return
        verb, rest = sentence(event)
        self._print(
            Text.assemble(
                (f"step {event.step:<6} ", "dim"), (f"{verb:<10} ", VERB_STYLES.get(verb, "bold")), rest
            )
        )

    def _print(self, line: str | Text, style: str = "") -> None:
        from rich.text import Text

        text = Text(line, style=style) if isinstance(line, str) else line
        text.plain = self._encodable(text.plain)
        # without a terminal a long line stays one line: it is read by grep, not by eye
        self._guarded(lambda: self._console.print(text, soft_wrap=not self._console.is_terminal))

    def _start_live(self) -> None:
        from rich.live import Live

        if self._silent:
            return
        self._live = Live(
            self._render(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self._guarded(self._live.start)

    def _redraw(self) -> None:
        self._drawn_at = time.monotonic()
        live = self._live
        if live is not None:
            self._guarded(lambda: live.update(self._render(), refresh=True))

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._guarded(live.stop)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = self._share()
        width = self._console.width
        grid = Table.grid(padding=(0, 1), expand=True)
        cells: list[RenderableType] = []
        if width >= 20:
            grid.add_column(no_wrap=True, overflow="ellipsis", max_width=max(8, width // 5))
            cells.append(Text(self._encodable(self._name), style="bold"))
        if width >= 60:
            grid.add_column(ratio=1, min_width=8)
            cells.append(ProgressBar(total=1.0, completed=share))
        grid.add_column(no_wrap=True, overflow="ellipsis", justify="right")
        figures = self._figures()
        cells.append(Text(self._encodable(f"{self._position()}  {self._time_left(share)}".rstrip())))
        grid.add_row(*cells)
        details = "  ".join(filter(None, (*figures, self._seeds(), self._waits_text())))
        if self._waits and self._wait_reason:
            details += f" (last: {self._wait_reason})"
        second = Text(self._encodable(details), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(grid, second)

    def _share(self) -> float:
        if self._total_steps:
            return min(1.0, self._step / self._total_steps)
        return min(1.0, self._epoch / self._total_epochs) if self._total_epochs else 0.0

    def _time_left(self, share: float) -> str:
        """Extrapolate from the steps done in this process; nothing before 2 % are done."""
        before = (self._first_step or 0) / self._total_steps if self._total_steps else 0.0
        if not 0.02 < share - before < 1 or share >= 1:
            return ""
        elapsed = time.monotonic() - self._started_at
        return f"{units.duration(elapsed * (1 - share) / (share - before))} left"

    def _encodable(self, text: str) -> str:
        """Return ``text`` with what the terminal's encoding lacks as ``?``, so that printing cannot fail."""
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _guarded(self, draw: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            draw()
        except (OSError, ValueError, SystemExit) as error:
            # on a broken pipe rich exits the process (Console.on_broken_pipe); training is worth more
            if isinstance(error, ValueError) and not self._console.file.closed:
                raise  # only "I/O operation on closed file" is a matter of the output
            self._silent, self._live = True, None
            _log.warning("the display's output is gone (%r); training goes on without it", error)
