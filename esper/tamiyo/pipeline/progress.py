"""How far a learning is: a bar for each part on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Parts"]


class Parts:
    """Shows parts of a learning one after another.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def part(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Begin a part; call what it gives, with a few words, for each of ``total`` things that is done."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not terminal) as bar:
            task = bar.add_task(name, total=total, note="")
            count = 0

            def done(note: str) -> None:
                nonlocal count
                count += 1
                bar.update(task, completed=count, note=note)
                if not terminal:
                    self.console.print(f"{name} {count}/{total}: {note}", soft_wrap=True)

            yield done
