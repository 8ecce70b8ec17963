"""Spread independent runs over worker processes, one thread each, with a progress bar on standard error."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

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
    with _one_thread(), ProcessPoolExecutor(num_workers, mp_context=context, initializer=prepare) as pool:
        futures = {pool.submit(work, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Workers read this while they start; more threads than cores make small nets slower, not faster."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
