"""Worker processes: order, threads, failures with their reasons, and a fresh start after one."""

from __future__ import annotations

import pytest
import torch
from worker_tasks import die, fail, leave, square

from esper.errors import ConfigError
from esper.tamiyo.environment.workers import LocalWorkers, WorkerError


def test_results_come_in_order_from_one_thread_each_and_failures_say_why() -> None:
    with LocalWorkers(2) as workers:
        assert workers.map(square, [3, 1, 2, 5, 4]) == [(9, 1), (1, 1), (4, 1), (25, 1), (16, 1)]
        processes = [process for process, _ in workers._workers]
        workers.map(square, [1])
        assert [process for process, _ in workers._workers] == processes  # they stay alive between calls
        with pytest.raises(WorkerError, match=r"task 0 failed in worker process \d+:[\s\S]*has no answer"):
            workers.map(fail, [4])
        assert not any(process.is_alive() for process in processes)
        with pytest.raises(WorkerError, match=r"ended by signal SIGKILL .*while it worked on task 1"):
            workers.map(die, [0, 1])
        with pytest.raises(WorkerError, match=r"ended with exit code 7 while it worked on task 0"):
            workers.map(leave, [0])
        assert workers.map(square, []) == []


def test_without_workers_tasks_run_here_with_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert LocalWorkers(0).map(square, [2]) == [(4, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="has no answer"):
        LocalWorkers(0).map(fail, [1])
    with pytest.raises(ConfigError, match="num_workers must be at least 0"):
        LocalWorkers(-1)
