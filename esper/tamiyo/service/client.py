"""The run's end of the line: asks in the background, and never makes the training wait.

A thread of its own owns the socket. What it is given to ask it asks until there is an answer: after a lost service, a
restarted one, a full queue. The request id makes that harmless: a request is decided once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from esper.oona.codec import MAX_MESSAGE_BYTES, FrameError
from esper.oona.config import check_address
from esper.oona.endpoint import new_socket
from esper.oona.keys import Keys
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.service.protocol import (
    Answer,
    Ask,
    Beat,
    BeatBack,
    Busy,
    Hello,
    Leave,
    Noted,
    Refusal,
    Reply,
    Report,
    Request,
    Welcome,
    read_reply,
    topology_hash,
    write,
)

__all__ = ["ServiceClient"]

_LOG = logging.getLogger("esper.tamiyo.service")
_RESEND_S = 1.0
"""After which an unanswered message is sent again."""
_HEARTBEAT_S = 5.0
"""Until the service says how often it wants to hear from its runs."""
_PATIENCE = 3
"""Heartbeats without an echo after which the connection is made anew."""
_MAX_REPORTS = 256
_CLOSE_S = 1.0
_LATER = ("stopping", "full", "unstored", "unregistered")
"""Refusals that a later attempt may not meet."""
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class ServiceClient:
    """One run's line to a service; nothing here waits, except :meth:`close` for a moment.

    The thread is started with the first request and belongs to the process that made it: in a forked child nothing is
    sent and nothing arrives. A pickled copy travels without its thread.

    Args:
        address: Of the service, ``tcp://HOST:PORT`` or ``ipc:///path``.
        run_id: Of the run.
        keys: Folder of CURVE keys; needed beyond loopback. Empty: none.

    Raises:
        ConfigError: The address is malformed, or beyond loopback without keys, or there are no keys in the folder.
    """

    def __init__(self, address: str, run_id: str, *, keys: str = "") -> None:
        check_address(address, to_bind=False, keys=keys)
        if keys:
            Keys.load(keys)  # missing ones show now, not in the thread
        self.address, self.run_id, self.keys = address, run_id, keys
        self._line: _Line | None = None
        self._release: weakref.finalize[..., Any] | None = None
        self._pid = 0

    def ask(
        self, request_id: str, sequence: int, point: DecisionPoint, *, training_flops: float = 0.0
    ) -> None:
        """Have a decision point decided; one that is still being asked is given up for it."""
        line = self._open()
        if line is not None:
            ask = Ask(
                run_id=self.run_id,
                request_id=request_id,
                sequence=sequence,
                point=point,
                training_flops=training_flops,
            )
            line.give(lambda: line.set_question(ask))

    def give_up(self) -> None:
        """Ask no longer for what has not been answered."""
        if (line := self._mine()) is not None:
            line.give(lambda: line.set_question(None))

    def report(
        self,
        request_id: str,
        *,
        applied: bool,
        refused: str = "",
        step: int = 0,
        seed_ids: tuple[str, ...] = (),
    ) -> None:
        """Tell what became of an answer; it is told until the service has noted it."""
        line = self._open()
        if line is not None:
            report = Report(
                run_id=self.run_id,
                request_id=request_id,
                applied=applied,
                refused=refused,
                step=step,
                seed_ids=seed_ids,
            )
            line.give(lambda: line.add_report(report))

    @property
    def answered(self) -> bool:
        """Whether :meth:`take` has something."""
        line = self._mine()
        return line is not None and bool(line.inbox)

    def take(self) -> list[Answer | Refusal]:
        """What has come since the last call: answers, and refusals for good."""
        line = self._mine()
        found: list[Answer | Refusal] = []
        while line is not None and line.inbox:
            found.append(line.inbox.popleft())
        return found

    @property
    def state(self) -> str:
        """How the line is, in words."""
        line = self._mine()
        return line.state if line is not None else "not connected"

    def close(self) -> None:
        """Tell what is still to be told, for at most a second, and hang up. A later request opens the line again."""
        if (line := self._mine()) is not None and self._release is not None:
            self._release.detach()
            line.stop()
        self._line = self._release = None

    def _mine(self) -> _Line | None:
        return self._line if self._pid == os.getpid() else None

    def _open(self) -> _Line | None:
        """The line, made when need be; None in a forked child, whose answers would be the parent's."""
        if self._line is None:
            self._pid = os.getpid()
            self._line = _Line(self.address, self.run_id, self.keys)
            # a client that is dropped without close() leaves no thread behind; nor does one at exit
            self._release = weakref.finalize(self, self._line.stop)
            self._line.start()
        return self._mine()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "run_id": self.run_id, "keys": self.keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["address"], state["run_id"], keys=state["keys"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"ServiceClient({self.address}, {self.run_id!r}, {self.state})"


@dataclass
class _Timed:
    """A message, and when it is due to be sent, monotonic seconds."""

    message: Any
    due_s: float = 0.0


class _Line:
    """The thread, its socket, and what it still has to say."""

    def __init__(self, address: str, run_id: str, keys: str) -> None:
        self.state = f"connecting to {address}"
        self.inbox: deque[Answer | Refusal] = deque()
        self._address, self._run_id = address, run_id
        self._keys = Keys.load(keys) if keys else None
        self._orders: deque[Any] = deque()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._pid = os.getpid()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"esper-service-{run_id}", daemon=True)
        self._question: _Timed | None = None
        self._hello: _Timed | None = None
        self._reports: OrderedDict[str, _Timed] = OrderedDict()
        self._registered = False
        self._heartbeat_s = _HEARTBEAT_S
        self._max_bytes = MAX_MESSAGE_BYTES
        self._beats = 0
        self._next_beat_s = self._heard_s = time.monotonic()
        self._told = ""

    # ---------------------------------------------------------------- from the training thread

    def start(self) -> None:
        self._thread.start()

    def give(self, order: Any) -> None:
        """Have the thread do something soon."""
        self._orders.append(order)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self._writer, b"!")

    def stop(self) -> None:
        """Hang up; waits for a second at most. Does nothing in a forked child."""
        if self._pid != os.getpid() or self._ended:
            return
        self._ended = True
        self.give(lambda: None)
        self._thread.join(2 * _CLOSE_S)
        if not self._thread.is_alive():
            os.close(self._reader)
            os.close(self._writer)

    # ---------------------------------------------------------------- in the thread

    def set_question(self, ask: Ask | None) -> None:
        self._question = None if ask is None else _Timed(ask)
        if ask is None:
            return
        hello = Hello(run_id=self._run_id, topology=topology_hash(ask.point.topology))
        if self._hello is None or hello != self._hello.message:  # more may be known of the host than at first
            self._hello, self._registered = _Timed(hello), False

    def add_report(self, report: Report) -> None:
        while len(self._reports) >= _MAX_REPORTS:
            self._reports.popitem(last=False)
        self._reports[report.request_id] = _Timed(report)

    def _run(self) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(zmq.ContextTerminated):  # the process ends
            self._talk(stack)

    def _talk(self, stack: contextlib.ExitStack) -> None:
        deadline_s = float("inf")
        socket, monitor = self._connect(stack)
        while time.monotonic() < deadline_s:
            if self._ended and deadline_s == float("inf"):
                self._question = None
                deadline_s = time.monotonic() + _CLOSE_S
            if self._ended and not self._reports:
                break
            self._wait(socket, monitor)
            if time.monotonic() - self._heard_s > _PATIENCE * self._heartbeat_s and self._wants():
                # ZeroMQ reconnects by itself, but what its queue holds for the old connection is stale
                stack.close()
                socket, monitor = self._connect(stack)
            self._say(socket)
        if self._registered:
            self._send(socket, Leave(run_id=self._run_id))

    def _connect(self, stack: contextlib.ExitStack) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        socket = new_socket(zmq.DEALER)
        socket.linger = 200
        socket.immediate = True  # nothing is queued for a service that is not there
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if self._keys is not None:
            self._keys.secure_client(socket)
        monitor = socket.get_monitor_socket(_EVENTS)
        stack.callback(socket.close)
        stack.callback(monitor.close)
        stack.callback(_stop_monitor, socket)
        socket.connect(self._address)
        self._registered = False
        self._heard_s = time.monotonic()
        return socket, monitor

    def _wants(self) -> bool:
        return self._registered or self._question is not None or bool(self._reports)

    def _wait(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        """Sleep until something comes or is due, and take it."""
        poller = zmq.Poller()
        for source in (socket, monitor, self._reader):
            poller.register(source, zmq.POLLIN)
        ready = dict(poller.poll(max(1, math.ceil(1000.0 * (self._next_s() - time.monotonic())))))
        if self._reader in ready:
            os.read(self._reader, 4096)
        while self._orders:
            self._orders.popleft()()
        if monitor in ready:
            while monitor.poll(0):
                self._note_event(int(recv_monitor_message(monitor)["event"]))
        if socket in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    self._hear(socket.recv(zmq.NOBLOCK))

    def _next_s(self) -> float:
        """When something is due, monotonic seconds."""
        due = [timed.due_s for timed in self._reports.values()]
        if self._question is not None:
            due.append(self._question.due_s if self._registered else self._hello_due_s())
        if self._registered:
            due.append(self._next_beat_s)
        return min(due, default=time.monotonic() + _HEARTBEAT_S)

    def _hello_due_s(self) -> float:
        return self._hello.due_s if self._hello is not None else time.monotonic()

    def _say(self, socket: zmq.Socket[bytes]) -> None:
        """Send what is due."""
        now = time.monotonic()
        if self._question is not None and not self._registered:
            if self._hello is not None and now >= self._hello.due_s:
                self._hello.due_s = now + _RESEND_S
                self._send(socket, self._hello.message)
        elif self._question is not None and now >= self._question.due_s:
            self._question.due_s = now + _RESEND_S
            self._send(socket, self._question.message)
        for timed in self._reports.values():
            if now >= timed.due_s:
                timed.due_s = now + _RESEND_S
                self._send(socket, timed.message)
        if self._registered and now >= self._next_beat_s:
            self._next_beat_s = now + self._heartbeat_s
            self._beats += 1
            self._send(socket, Beat(run_id=self._run_id, number=self._beats))

    def _send(self, socket: zmq.Socket[bytes], message: Request) -> None:
        data = write(message)
        if len(data) > self._max_bytes:
            reason = f"{len(data)} bytes are more than the {self._max_bytes} that the service takes"
            self._settle(Refusal(cause="oversized", reason=reason, request_id=_request_id(message)))
            return
        # no connection, or it does not read: it is sent again later
        with contextlib.suppress(zmq.Again):
            socket.send(data, zmq.NOBLOCK)

    def _note_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._tell(f"connected to {self._address}")
            self._due_at_once()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._tell(
                f"the service at {self._address} does not know this run's key: let its operator add it with "
                "`esper keys allow`",
                warn=True,
            )
        elif event == zmq.EVENT_DISCONNECTED:
            if self._state_is_good():
                self._tell(f"lost the service at {self._address}", warn=True)
            self._registered = False
        else:
            self._tell(
                f"the service at {self._address} has another key than this run trusts, or wants keys and got none: "
                "compare with `esper keys show`",
                warn=True,
            )

    def _state_is_good(self) -> bool:
        return self.state.startswith("connected")

    def _tell(self, state: str, *, warn: bool = False) -> None:
        self.state = state
        if warn and state != self._told:
            self._told = state
            _LOG.warning("run %s: %s; it trains on, and nothing grows meanwhile", self._run_id, state)
        elif not warn and self._told:
            self._told = ""
            _LOG.info("run %s: %s again", self._run_id, state)

    def _due_at_once(self) -> None:
        for timed in (self._hello, self._question, *self._reports.values()):
            if timed is not None:
                timed.due_s = 0.0

    def _hear(self, data: bytes) -> None:
        try:
            reply: Reply = read_reply(data)
        except FrameError as error:
            self._tell(f"the service at {self._address} says what is not understood: {error}", warn=True)
            return
        self._heard_s = now = time.monotonic()
        if isinstance(reply, Welcome):
            self._registered = True
            self._heartbeat_s, self._max_bytes = max(0.05, reply.heartbeat_s), reply.max_message_bytes
            self._next_beat_s = now + self._heartbeat_s
            if self._question is not None:
                self._question.due_s = 0.0
        elif isinstance(reply, BeatBack):
            if not reply.registered:
                self._unregister()
        elif isinstance(reply, Busy):
            if self._question is not None and reply.request_id == self._question.message.request_id:
                self._question.due_s = now + reply.retry_after_ms / 1000.0
        elif isinstance(reply, Noted):
            self._reports.pop(reply.request_id, None)
        elif isinstance(reply, Answer | Refusal):
            self._settle(reply)

    def _settle(self, reply: Answer | Refusal) -> None:
        """An answer, or a refusal: of the question, of a report, or of the greeting."""
        later = isinstance(reply, Refusal) and reply.cause in _LATER
        if isinstance(reply, Refusal):
            if reply.cause == "unregistered":
                self._unregister()
            if later:
                return  # it is sent again when it is due
            if reply.request_id in self._reports:
                _LOG.warning("run %s: the service did not take a report: %s", self._run_id, reply.reason)
                del self._reports[reply.request_id]
                return
        if self._question is not None and reply.request_id in (self._question.message.request_id, ""):
            self._question = None
            self.inbox.append(reply)

    def _unregister(self) -> None:
        self._registered = False
        if self._hello is not None:
            self._hello.due_s = 0.0


def _request_id(message: Request) -> str:
    return message.request_id if isinstance(message, Ask | Report) else ""


def _stop_monitor(socket: zmq.Socket[bytes]) -> None:
    with contextlib.suppress(zmq.ContextTerminated):
        socket.disable_monitor()
