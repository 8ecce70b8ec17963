"""Make a table: try every planned state, keep each as soon as it is finished, merge them at the end."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esper.errors import ConfigError
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.oracle.plan import StatePlan
from esper.tamiyo.oracle.shards import finished, read_shards, write_shard
from esper.tamiyo.oracle.table import write_table
from esper.tamiyo.oracle.trials import TRIED, try_state
from esper.threads import one_thread_for_children

__all__ = ["Report", "generate", "merge"]


@dataclass(frozen=True)
class Report:
    """What became of one planned state.

    Attributes:
        state_id: Which.
        num_runs: Trained to the end; 0 where nothing but WAIT was offered, so that no state was kept.
        seconds: It took.
    """

    state_id: str
    num_runs: int
    seconds: float


def generate(
    plans: Sequence[StatePlan],
    folder: Path,
    *,
    repeats: int = 2,
    num_workers: int = 1,
    candidates: CandidateConfig = TRIED,
    budget_s: float | None = None,
) -> list[Report]:
    """Try the states of ``plans`` that ``folder`` does not hold yet, in their order.

    A bar with the time that remains is shown on a terminal, a line a state elsewhere.

    Args:
        plans: What is wanted.
        folder: One file a finished state; a run that was killed goes on after those.
        repeats: Orders of the data in which each candidate is tried.
        num_workers: Processes of one thread each; 0 works in this one.
        candidates: What is offered.
        budget_s: Begin no state later than this many seconds from now.

    Returns:
        A report of every state that was tried now, in the order in which they were finished.

    Raises:
        ConfigError: Fewer than two repeats, with which noise cannot be told from gain.
    """
    if repeats < 2 or num_workers < 0:
        raise ConfigError(f"expected repeats >= 2 and num_workers >= 0, got {repeats} and {num_workers}")
    done = finished(folder)
    todo = [plan for plan in plans if plan.state_id not in done]
    work = partial(_keep, folder=folder, repeats=repeats, candidates=candidates)
    until = time.monotonic() + budget_s if budget_s is not None else float("inf")
    reports = []
    with _Progress(len(plans), len(plans) - len(todo)) as progress:
        for report in _results(work, todo, num_workers, until):
            reports.append(report)
            progress.tell(report)
    return reports


def merge(folder: Path, table: Path) -> int:
    """Write all finished states of ``folder`` as a table, and return how many there are.

    Raises:
        DataFormatError: A file is damaged, or hosts leak between splits.
    """
    records = read_shards(folder)
    write_table(table, records)
    return len(records)


def _keep(plan: StatePlan, *, folder: Path, repeats: int, candidates: CandidateConfig) -> Report:
    started = time.perf_counter()
    record = try_state(plan, repeats=repeats, candidates=candidates)
    if record is not None:
        write_shard(folder, record)
    runs = 0 if record is None else len(record.outcomes)
    return Report(plan.state_id, runs, time.perf_counter() - started)


def _results(
    work: partial[Report], todo: Sequence[StatePlan], num_workers: int, until: float
) -> Iterator[Report]:
    if num_workers == 0:
        for plan in todo:
            if time.monotonic() >= until:
                return
            yield work(plan)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pools in any state
    with (
        one_thread_for_children(),
        ProcessPoolExecutor(num_workers, mp_context=context, initializer=_prepare) as pool,
    ):
        waiting = list(reversed(todo))
        running = {pool.submit(work, waiting.pop()) for _ in range(min(num_workers, len(todo)))}
        try:
            while running:
                future = next(as_completed(running))
                running.remove(future)
                if waiting and time.monotonic() < until:
                    running.add(pool.submit(work, waiting.pop()))
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)


class _Progress:
    """A bar on a terminal; elsewhere a line a state, for a log."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("states", total=total, completed=done)
        self._total, self._done, self._new = total, done, 0
        self._started = time.monotonic()
        self._lines = not console.is_terminal

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def tell(self, report: Report) -> None:
        """One more state."""
        self._done, self._new = self._done + 1, self._new + 1
        self._bar.advance(self._task)
        if self._lines:
            left = (time.monotonic() - self._started) / self._new * (self._total - self._done)
            print(
                f"{self._done}/{self._total} {report.state_id}: {report.num_runs} runs in {report.seconds:.0f} s, "
                f"about {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
