"""Tasks that worker processes of the tests import."""

from __future__ import annotations

import os
import signal


def square(x: int) -> tuple[int, int]:
    import torch  # here, because a process that is only to die need not wait for it

    return x * x, torch.get_num_threads()


def fail(x: int) -> int:
    raise ValueError(f"task {x} has no answer")


def die(x: int) -> int:
    if x == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def leave(x: int) -> int:
    os._exit(7)
