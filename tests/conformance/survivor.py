"""Trains in processes of its own that are killed: a server that imports once and forks a child for each order.

Run as a script it reads orders, one JSON object a line, and answers each with the child's exit status, negative
for a signal. An order names a training (``fit`` is a user's own script, ``train`` is ``esper train``), its folder
and how the child dies: by SIGKILL from its own hand, as if from outside in mid-stride, or by a signal from the
server. Importing everything takes seconds, a child's whole training less than one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L

__all__ = ["EVENTS", "Survivors"]

ROOT = Path(__file__).parents[2]

EVENTS = [
    [0.05, "bypass:host.layers.0->host.layers.1", "widen", 4],
    [0.2, "bypass:host.layers.0->host.head", "shortcut", 3],
    [0.5, "parallel:host.layers.0", "lowrank", 2],
    [0.7, "bypass:host.layers.1->host.layers.2", "widen", 4],
]
"""Growth of a ``fit``: seeds germinate, blend and fossilise all over its 51 steps."""


class Survivors:
    """The server as a test uses it.

    Args:
        folder: For its error output.
    """

    def __init__(self, folder: Path) -> None:
        paths = (ROOT, ROOT / "tests" / "callbacks", Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        environment["ESPER_RUNTIME_DIR"] = str(folder / "runtime")
        self.runtime = folder / "runtime"
        self.errors = folder / "errors.txt"
        self._stderr = self.errors.open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            text=True, env=environment, cwd=folder,
        )  # fmt: skip

    def run(self, kind: str, folder: Path, *arguments: str, stop: Mapping[str, Any] | None = None) -> int:
        """Train in a child and return its exit status.

        Args:
            kind: ``fit`` or ``train``.
            folder: Of the run.
            arguments: Of ``esper train``, or names of options of ``fit``.
            stop: ``{"before": [EVENT, FILE], "nth": n}`` kills the child before the n-th time that it opens
                (``open``, for writing), puts in place (``os.rename``) or removes (``os.remove``) a file below
                the folder; ``{"call": NAME, "nth": n}`` on entering the n-th call of a function; ``{"bytes": n}``
                where a file grows beyond n bytes, in mid-write; ``{"seconds": s, "signal": N}`` sends a signal s
                seconds after training has begun. None lets it live.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"kind": kind, "folder": str(folder), "arguments": arguments, "stop": stop or {}}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.errors.read_text()
        return int(answer)

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=60)
        self._stderr.close()


def _serve() -> None:
    import runs  # noqa: F401  # everything that a child needs is imported once, here

    import esper.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a child prints shall not be taken for an answer
    for line in sys.stdin:
        order = json.loads(line)
        folder, stop = Path(order["folder"]), order["stop"]
        folder.mkdir(parents=True, exist_ok=True)
        started, starting = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(started)
            _live(order["kind"], folder, order["arguments"], stop, starting)
        os.close(starting)
        if "seconds" in stop and os.read(started, 1):  # nothing to read: it died before it trained
            time.sleep(stop["seconds"])
            os.kill(child, stop["signal"])
        _, status = os.waitpid(child, 0)
        os.close(started)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _live(kind: str, folder: Path, arguments: list[str], stop: Mapping[str, Any], starting: int) -> None:
    """The child's life; never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        if "before" in stop:
            _die_before(folder, *stop["before"], stop["nth"])
        if "call" in stop:
            _die_on_call(stop["call"], stop["nth"])
        if "bytes" in stop:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (stop["bytes"], stop["bytes"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = (
                _fit(folder, arguments, starting) if kind == "fit" else _train(folder, arguments, starting)
            )
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_before(folder: Path, event: str, file: str, nth: int) -> None:
    wanted, left = str(folder / file), nth

    def hook(happening: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if happening != event or str(arguments[event == "os.rename"]) != wanted:
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left == 0:
            _die()

    sys.addaudithook(hook)


def _die_on_call(name: str, nth: int) -> None:
    left = nth

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event == "call" and frame.f_code.co_name == name:
            left -= 1
            if left == 0:
                _die()

    sys.setprofile(profile)


class _Starting(L.Callback):
    """Tells the server that training has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        os.write(self.pipe, b"x")


def _fit(folder: Path, arguments: list[str], starting: int) -> int:
    """A user's own script: it continues from the last checkpoint that it finds."""
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
    from runs import growing, mlp, trainer

    from esper.callbacks.checkpoint_io import AtomicCheckpointIO
    from esper.hosts import DigitsData

    bus = {"transport": "ipc"} if "bus" in arguments else None
    callback = growing(folder, *EVENTS, bus=bus)
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=5, save_last=True)
    guards = [OnExceptionCheckpoint(folder / "checkpoints", "exception")] if "guarded" in arguments else []
    runner = trainer(
        folder, callback, _Starting(starting), *guards, saver, epochs=3, enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    torch.manual_seed(1)
    given = [a.removeprefix("from=") for a in arguments if a.startswith("from=")]
    runner.fit(mlp(), DigitsData(), ckpt_path=given[0] if given else "last", weights_only=True)
    runner.save_checkpoint(folder / "final.ckpt")
    return 0


def _train(folder: Path, arguments: list[str], starting: int) -> int:
    """``esper train``; the folder is its run folder."""
    from esper import arms, cli

    listed = arms._extra
    arms._extra = lambda specs: [*listed(specs), _Starting(starting)]
    where = f"resume={folder}" if "resume" in arguments else f"hydra.run.dir={folder}"
    return cli.main(["train", *(a for a in arguments if a != "resume"), where])


if __name__ == "__main__":
    _serve()
