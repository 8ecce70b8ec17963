"""Workers on a Ray cluster (extra ``ray``), with the interface of :class:`~.workers.LocalWorkers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from esper.errors import ConfigError, MissingExtraError
from esper.tamiyo.environment.workers import WorkerError

__all__ = ["RayWorkers"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class RayWorkers:
    """A pool of Ray actors of one core and one thread each.

    Joins the cluster that this process has joined by ``ray.init``, or starts one on this machine, which
    :meth:`close` then ends.

    Args:
        num_workers: Actors.

    Raises:
        ConfigError: Fewer than one.
        MissingExtraError: ``ray`` is not installed.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise ConfigError(f"rollout='ray' needs at least one worker, got num_workers={num_workers}")
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise MissingExtraError(
                "rollout='ray' needs Ray, which is not installed; pip install 'esper[ray]', or use rollout='local'"
            ) from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        actor = ray.remote(num_cpus=1, runtime_env=environment)(_Worker)
        self._actors = [actor.remote() for _ in range(num_workers)]
        self._pool = ActorPool(self._actors)

    def map(self, function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
        """``function(task)`` of every task, in the tasks' order, whoever works on which.

        Raises:
            WorkerError: A task raised, or its actor died; the text says how.
        """
        try:
            return list(self._pool.map(lambda actor, task: actor.work.remote(function, task), list(tasks)))
        except self._ray.exceptions.RayError as error:
            raise WorkerError(f"a rollout failed on the Ray cluster: {error}") from error

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(cast(Any, actor))
        self._actors = []
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()


class _Worker:
    """One actor."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def work(self, function: Callable[[Any], Any], task: Any) -> Any:
        return function(task)
