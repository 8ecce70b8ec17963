"""A bound socket of a run: opened late, owned by one process, announced, and closed for certain."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket as stdlib_socket
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import zmq

from esper.errors import ConfigError
from esper.oona.config import BusConfig
from esper.oona.doorman import doorman_of_process
from esper.oona.keys import Keys
from esper.oona.runs import Role, announce, reserve

__all__ = ["Endpoint", "inproc_address", "is_taken", "new_socket"]

_LOG = logging.getLogger("esper.oona")
_HARD_LIMIT_FACTOR = 4
_EXIT_S = 1.0  # above the default linger_ms
_REBIND_S = 0.5  # ZeroMQ gives an address back a moment after closing, in a thread of its own


def inproc_address(run_id: str, role: Role) -> str:
    """Where a run is reachable inside its own process."""
    return f"inproc://esper/{run_id}/{role}"


def new_socket(kind: int) -> zmq.Socket[bytes]:
    """A socket of the process-wide context, which ZeroMQ keeps apart for forked children."""
    global _exit_pid
    if _exit_pid != os.getpid():
        _exit_pid = os.getpid()
        atexit.register(_leave, _exit_pid)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    return context.socket(kind)


def _leave(pid: int) -> None:
    """At interpreter exit: close what was forgotten, and let the last messages out.

    pyzmq does not end its context at exit, so whatever a closed socket still holds (the word that the run
    has ended) would be lost. Ending it waits for every socket of the process, also those of others: hence
    in a thread, and for a bounded time.
    """
    if os.getpid() != pid:
        return  # inherited over a fork
    for endpoint in list(_OPEN):
        endpoint.close()
    ending = threading.Thread(target=zmq.Context.instance().term, daemon=True)
    ending.start()
    ending.join(_EXIT_S)


class Endpoint:
    """The part that :class:`Publisher` and :class:`CommandInbox` share.

    The socket is opened on first use and belongs to the process that opened it. After a fork the child's
    copy is **silent**: it sends and receives nothing, and closing it leaves the parent's alone (a socket
    inherited over a fork would write into the void, and two processes under one address would mix their
    sequence numbers). A pickled copy travels without its socket and opens one of its own on first use.
    Use it from one thread.

    Args:
        run_id: the run's name, 1 to 128 printable characters.
        config: settings of the bus; default :class:`BusConfig`.
        run_dir: the run's folder, told to ``esper watch``.

    Raises:
        ConfigError: the run id is empty, too long, or not printable.
    """

    role: ClassVar[Role]
    _socket_type: ClassVar[int]

    def __init__(self, run_id: str, config: BusConfig | None = None, *, run_dir: str | Path = "") -> None:
        if not (0 < len(run_id) <= 128 and run_id.isprintable()):
            raise ConfigError(f"expected a run id of 1 to 128 printable characters, got {run_id!r}")
        self.run_id = run_id
        self.config = config if config is not None else BusConfig()
        self.run_dir = str(Path(run_dir).absolute()) if run_dir else ""
        self._forget()

    def _forget(self) -> None:
        self._socket: zmq.Socket[bytes] | None = None
        self._owner_pid = 0
        self._addresses: tuple[str, ...] = ()
        self._closed = False
        self._release: weakref.finalize[..., Any] | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Bound endpoints, the in-process one first; empty until opened."""
        return self._addresses

    def open(self) -> Self:
        """Bind now rather than on first use, so that readers can connect before the first message.

        Raises:
            ConfigError: the address is taken or cannot be bound.
        """
        self._own_socket()
        return self

    def _own_socket(self) -> zmq.Socket[bytes] | None:
        """The socket, opened when need be; None when closed or in a forked child."""
        if self._socket is not None:
            return self._socket if os.getpid() == self._owner_pid else None
        return None if self._closed else self._bind()

    def _bind(self) -> zmq.Socket[bytes]:
        socket = new_socket(self._socket_type)
        leftovers: list[Callable[[], None]] = []
        try:
            self._configure(socket)
            addresses = [_bind_one(socket, inproc_address(self.run_id, self.role))]
            addresses += self._bind_external(socket, leftovers)
        except BaseException:
            _release(socket, leftovers, os.getpid())
            raise
        self._socket, self._owner_pid, self._addresses = socket, os.getpid(), tuple(addresses)
        # a publisher that is dropped without close() leaves no descriptor behind; nor does one at exit
        self._release = weakref.finalize(self, _release, socket, leftovers, self._owner_pid)
        self._release.atexit = False
        _OPEN.add(self)
        return socket

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        socket.linger = self.config.linger_ms
        socket.set_hwm(self.config.high_water_mark)
        # What is a little too large is read, counted and reported by the codec. This second limit guards
        # memory: beyond it ZeroMQ itself hangs up on the peer.
        socket.setsockopt(zmq.MAXMSGSIZE, _HARD_LIMIT_FACTOR * self.config.max_message_bytes)
        if self.config.keys:
            doorman_of_process().guard(socket, Keys.load(self.config.keys))

    def _bind_external(self, socket: zmq.Socket[bytes], leftovers: list[Callable[[], None]]) -> list[str]:
        """Bind what other processes connect to, and announce it; ``leftovers`` is what closing removes."""
        config = self.config
        if config.transport == "inproc" and not config.announce:
            return []
        address = config.address if self.role == "telemetry" else config.command_address
        try:
            # a tcp endpoint or an explicit path needs the runtime directory only to be announced
            stem = reserve(self.run_id, self.role) if config.announce or not address else None
            if not address:
                address = "tcp://127.0.0.1:*" if config.transport == "tcp" else f"ipc://{stem}.sock"
            bound = _bind_one(socket, address)
            if bound.startswith("ipc://"):  # ZeroMQ leaves the file behind
                leftovers.append(partial(Path(bound.removeprefix("ipc://")).unlink, missing_ok=True))
            if config.announce and stem is not None:
                announcement = announce(
                    stem,
                    role=self.role,
                    run_id=self.run_id,
                    address=_local(bound),
                    run_dir=self.run_dir,
                    keys=str(Path(config.keys).absolute()) if config.keys else "",
                )
                leftovers.append(announcement.withdraw)
        except (ConfigError, OSError) as error:
            if config.transport != "inproc":
                raise
            _LOG.warning("run %s cannot be watched from another process: %s", self.run_id, error)
            return []
        return [bound]

    def close(self) -> None:
        """Send what waits (for at most ``linger_ms``), unbind and withdraw the announcement. Idempotent."""
        self._closed = True
        _OPEN.discard(self)
        self._addresses = ()
        self._socket = None
        if self._release is not None and (release := self._release.detach()) is not None:
            _, function, arguments, _ = release  # calling the finalizer itself does nothing at exit
            function(*arguments)
        self._release = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "config": self.config, "run_dir": self.run_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["run_id"], state["config"], run_dir=state["run_dir"])  # type: ignore[misc]

    def __repr__(self) -> str:
        where = ", ".join(self._addresses) or ("closed" if self._closed else "not open")
        return f"{type(self).__name__}({self.run_id!r}, {where})"


_OPEN: weakref.WeakSet[Endpoint] = weakref.WeakSet()
_exit_pid = 0


def _bind_one(socket: zmq.Socket[bytes], address: str) -> str:
    """Bind and return the endpoint with its real port.

    Raises:
        ConfigError: with ZeroMQ's reason.
    """
    deadline = time.monotonic() + _REBIND_S
    while True:
        try:
            if address.startswith("ipc://") and is_taken(address):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            socket.bind(address)
            break
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            cure = (
                "close the earlier one of this run first"
                if address.startswith("inproc")
                else "choose another address, or leave it empty for a free one"
            )
            raise ConfigError(
                f"expected to bind {address}, but: {zmq.strerror(error.errno or 0)}; {cure}"
            ) from error
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes), f"LAST_ENDPOINT gave {type(bound).__name__}"
    return bound.rstrip(b"\0").decode()


def _local(address: str) -> str:
    """Where an endpoint that is bound to every interface is reached on this machine."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def is_taken(address: str) -> bool:
    """Whether somebody listens on a socket file: ZeroMQ would silently take the path over from them."""
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return False  # no such file, or left behind by a process that has died: free to take
    return True


def _release(socket: zmq.Socket[bytes], leftovers: list[Callable[[], None]], owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child: the socket and its files are the parent's
    with contextlib.suppress(zmq.ZMQError):  # the context may be gone already at interpreter exit
        socket.close()
    while leftovers:  # the last made goes first: the announcement before the socket file
        leftovers.pop()()
