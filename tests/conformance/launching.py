"""Start functions in several real processes that find each other as under torchrun, and bring back what they return.

A fork server imports everything once and clean; each launch forks from it. A fork of the test process itself
would not do: autograd does not survive one once it has run.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

__all__ = ["Ended", "launch_all"]

_PRELOADED = ["torch", "lightning.pytorch", "esper.callbacks", "esper.hosts", "runs", "launching"]


class Ended:
    """How one process ended: what it returned, or its traceback with every note, and its exit code."""

    def __init__(self, result: Any, error: str, exit_code: int | None) -> None:
        self.result, self.error, self.exit_code = result, error, exit_code


def launch_all(
    jobs: list[tuple[Callable[[int, Path], Any], Path, int]], *, timeout_s: float
) -> list[list[Ended]]:
    """Run each job's ``act(rank, folder)`` in so many processes, all jobs side by side.

    Args:
        jobs: What to run, a folder for it, and its number of processes.
        timeout_s: Those that hang are killed then.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    groups = []
    for act, folder, size in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        group = [context.Process(target=_run, args=(act, rank, size, port, folder)) for rank in range(size)]
        for process in group:
            process.start()
        groups.append(group)
    deadline = time.monotonic() + timeout_s
    for process in (p for group in groups for p in group):
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [
        [_ended(folder / f"rank{rank}.pt", process.exitcode) for rank, process in enumerate(group)]
        for (_, folder, _), group in zip(jobs, groups, strict=True)
    ]


def _run(act: Callable[[int, Path], Any], rank: int, size: int, port: int, folder: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank),
        LOCAL_RANK=str(rank), NODE_RANK="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    faulthandler.enable()
    warnings.simplefilter("error")  # as in the test process
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    try:
        result, error = act(rank, folder), ""
    except BaseException:
        result, error = None, traceback.format_exc()
    torch.save({"result": result, "error": error}, folder / f"rank{rank}.pt")
    if error:
        os._exit(1)  # as a script ends that does not catch it, without waiting for the others


def _ended(path: Path, exit_code: int | None) -> Ended:
    if not path.is_file():
        return Ended(None, "it wrote nothing: it hung, or was killed", exit_code)
    found = torch.load(path, weights_only=True)
    return Ended(found["result"], found["error"], exit_code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
