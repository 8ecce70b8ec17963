"""A service in a thread, and waiting for what it does: what tests of the service and its clients share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.server import DecisionServer

QUICK: dict[str, Any] = {
    "address": "tcp://127.0.0.1:*", "http_address": "", "cycle_ms": 0.0, "cooldown_s": 0.0, "heartbeat_s": 0.2,
    "expiry_s": 5.0, "decider": "cond(size=small, ratio=0.5)",
}  # fmt: skip


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[DecisionServer]:
    """A service in a thread of this process."""
    decider = settings.pop("chooser", None)
    config = ServiceConfig(**(QUICK | {"store": str(folder / "x.db")} | settings))
    service = DecisionServer(config, decider=decider)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(10)
        assert not thread.is_alive()
