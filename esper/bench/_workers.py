"""Spread independent runs over worker processes, one thread each, with a progress bar on standard error."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from esper.threads import one_thread_for_children

__all__ = ["run_all"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def run_all(
    work: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    *,
    title: str,
    num_workers: int,
    prepare: Callable[[], None],
) -> list[_Result]:
    """Return ``work(task)`` of every task, in the tasks' order.

    Args:
        work: A function of a module, so that another process finds it.
        tasks: What to do; each must pickle.
        title: In front of the bar.
        num_workers: Processes; 0 works in this one.
        prepare: Called once in each process first.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    results: dict[int, _Result] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=len(tasks))
        for index, result in _results(work, tasks, num_workers, prepare):
            results[index] = result
            progress.advance(bar)
    return [results[index] for index in range(len(tasks))]


def _results(
    work: Callable[[_Task], _Result], tasks: Sequence[_Task], num_workers: int, prepare: Callable[[], None]
) -> Iterator[tuple[int, _Result]]:
    if num_workers == 0:
        prepare()
        for index, task in enumerate(tasks):
            yield index, work(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pools in any state
    with (
        one_thread_for_children(),
        ProcessPoolExecutor(num_workers, mp_context=context, initializer=prepare) as pool,
    ):
        futures = {pool.submit(work, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
