"""Worker processes that live as long as their pool, one torch thread each, and say why they died."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from esper.errors import ConfigError, EsperError
from esper.threads import one_thread_for_children

__all__ = ["LocalWorkers", "WorkerError"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_GRACE_S = 5.0


class WorkerError(EsperError, RuntimeError):
    """A task failed in another process, or the process died; the text says how."""


class LocalWorkers:
    """A pool of processes on this machine. ``with LocalWorkers(2) as workers: workers.map(f, tasks)``.

    Each process is started afresh (``spawn``) and computes with one thread, so a task gives the same result in
    any of them. With ``num_workers=0`` tasks are worked on in this process, with one thread as well.

    Args:
        num_workers: Processes; they start with the first tasks.

    Raises:
        ConfigError: A negative number.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 0:
            raise ConfigError(f"num_workers must be at least 0 (0: in this process), got {num_workers}")
        self.num_workers = num_workers
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
        """``function(task)`` of every task, in the tasks' order, whoever works on which.

        Args:
            function: Of a module, or a partial of one, so that another process finds it.
            tasks: Each must pickle.

        Raises:
            WorkerError: A task raised, or a process died. All processes are ended; the next call starts new ones.
        """
        if self.num_workers == 0:
            with _one_thread_here():
                return [function(task) for task in tasks]
        try:
            return self._spread(function, tasks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; those that do not go by themselves are terminated."""
        for _, pipe in self._workers:
            pipe.close()  # a worker that waits for a task takes the end of its pipe for its own
        for process, _ in self._workers:
            process.join(_GRACE_S if process.is_alive() else 0)
            if process.is_alive():
                process.terminate()
                process.join()
        self._workers = []

    def _spread(self, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
        self._start(min(self.num_workers, len(tasks)))
        results: dict[int, _Result] = {}
        waiting = list(enumerate(tasks))[::-1]
        busy: dict[Connection, tuple[BaseProcess, int]] = {}
        for process, pipe in self._workers[: len(tasks)]:
            _give(pipe, process, function, waiting, busy)
        while busy:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process, index = busy.pop(pipe)
                results[index] = _receive(pipe, process, index)
                if waiting:
                    _give(pipe, process, function, waiting, busy)
        return [results[index] for index in range(len(tasks))]

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would inherit torch's thread pools in any state
        with one_thread_for_children():
            while len(self._workers) < count:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()  # so that our end reads EOF when the process is gone
                self._workers.append((process, ours))


def _give(
    pipe: Connection,
    process: BaseProcess,
    function: Callable[[Any], Any],
    waiting: list[tuple[int, Any]],
    busy: dict[Connection, tuple[BaseProcess, int]],
) -> None:
    index, task = waiting.pop()
    try:
        pipe.send((function, task))
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _death(process, index) from error
    busy[pipe] = process, index


def _receive(pipe: Connection, process: BaseProcess, index: int) -> Any:
    try:
        succeeded, answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _death(process, index) from error
    if not succeeded:
        raise WorkerError(f"task {index} failed in worker process {process.pid}:\n{answer}")
    return answer


def _death(process: BaseProcess, index: int) -> WorkerError:
    process.join(_GRACE_S)
    code = process.exitcode
    how = "without an exit code" if code is None else f"with exit code {code}"
    if code is not None and code < 0:
        how = f"by signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += " (the system may have run out of memory)"
    return WorkerError(
        f"worker process {process.pid} ended {how} while it worked on task {index}; use fewer workers, or "
        "num_workers=0 to see what happens in this process"
    )


def _work(pipe: Connection) -> None:
    """Work on tasks until the pipe ends; the environment that it was started in says to use one thread."""
    while True:
        try:
            function, task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, function(task)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)


@contextmanager
def _one_thread_here() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
