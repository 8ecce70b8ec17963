"""The way back into a run: commands, taken at safe points and answered."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass

import zmq

from esper.errors import ConfigError, MessageError
from esper.messages import Command, CommandReply, Decision
from esper.oona.codec import FrameError, decode, encode
from esper.oona.config import check_address
from esper.oona.endpoint import Endpoint, inproc_address, new_socket
from esper.oona.keys import Keys
from esper.oona.runs import RunInfo, find_runs

__all__ = ["CommandInbox", "InboxStats", "send_command"]

_LOG = logging.getLogger("esper.oona")
_MAX_PER_POLL = 64
_MAX_REMEMBERED = 1024


@dataclass(slots=True)
class InboxStats:
    """Counts since the inbox was made: commands handed out, repeats of those, and refused ones."""

    accepted: int = 0
    repeated: int = 0
    refused: int = 0


class CommandInbox(Endpoint):
    """Takes commands for one run (ZeroMQ ``REP``); the run polls it where it may act on them.

    Every request is answered at the poll that reads it: accepted, or refused with the reason (not a valid
    message, another run, too large). A command that arrives twice, because its sender did not hear the
    first answer, is handed out once. Arguments, life cycle, forks: see :class:`Endpoint`.
    """

    role = "commands"
    _socket_type = zmq.REP

    def _forget(self) -> None:
        super()._forget()
        self.stats = InboxStats()
        self._seen: dict[str, None] = {}

    def poll(self) -> list[Command]:
        """Commands that have come since the last call; never waits.

        Returns:
            Valid commands for this run, oldest first, at most 64; none when closed or in a forked child.
        """
        commands: list[Command] = []
        socket = self._own_socket()
        if socket is None:
            return commands
        for _ in range(_MAX_PER_POLL):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            # A REP socket must answer before it reads on. The answer never waits: with the asker gone,
            # ZeroMQ discards it.
            socket.send(encode(self._take(parts, commands)))
        return commands

    def _take(self, parts: list[bytes], commands: list[Command]) -> CommandReply:
        command_id = ""
        try:
            if len(parts) != 1:
                raise FrameError("malformed", f"expected a frame of one part, got {len(parts)}")
            command = decode(parts[0], max_message_bytes=self.config.max_message_bytes)
            if not isinstance(command, Command):
                raise FrameError("unknown", f"expected a Command, got a {type(command).__name__}")
            command_id = command.command_id
            if command.run_id != self.run_id:
                raise MessageError(
                    f"expected a command for run {self.run_id!r}, got one for {command.run_id!r}: "
                    "look up its address with esper.oona.find_runs"
                )
        except MessageError as error:
            if not self.stats.refused:
                _LOG.warning("run %s refused a command: %s", self.run_id, error)
            self.stats.refused += 1
            return CommandReply(command_id=command_id, accepted=False, reason=str(error))
        if command_id in self._seen:
            self.stats.repeated += 1
            return CommandReply(command_id=command_id, accepted=True, reason="received before")
        if len(self._seen) >= _MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._seen[command_id] = None
        self.stats.accepted += 1
        commands.append(command)
        return CommandReply(command_id=command_id, accepted=True, reason="")


def send_command(
    target: str | RunInfo, decision: Decision, *, run_id: str = "", timeout_s: float = 10.0, keys: str = ""
) -> Command:
    """Ask a running training to carry out a decision.

    The run looks into its inbox between steps, so the answer takes as long as the step under way.

    Args:
        target: a run's id, a :class:`RunInfo`, or an ``ipc://`` or ``tcp://`` address (then give ``run_id``).
        decision: what to do.
        run_id: the run at the address.
        timeout_s: how long to wait for the answer, in seconds.
        keys: folder of CURVE keys for a run that wants them; a :class:`RunInfo` brings its own.

    Returns:
        The command as sent. It stands in the run's queue; whether it was applied is told by a
        ``DecisionRecord`` on the bus.

    Raises:
        ConfigError: the address is wrong or lacks ``run_id``, or the run takes no commands.
        MessageError: the run refused the command; the text has its reason.
        TimeoutError: no answer in time; the run may still act on the command later.
    """
    address, run_id, keys = _command_address(target, run_id, keys)
    command = Command(
        run_id=run_id, command_id=secrets.token_hex(8), decision=decision, timestamp=time.time()
    )
    with new_socket(zmq.REQ) as socket:
        socket.linger = 0
        if keys:
            Keys.load(keys).secure_client(socket)
        socket.connect(address)
        socket.send(encode(command))
        if not socket.poll(int(1000 * timeout_s)):
            raise TimeoutError(
                f"expected an answer from run {run_id!r} at {address} within {timeout_s:g} s, got none: "
                "is it still training (esper watch), and is the step under way longer than that?"
            )
        reply = decode(socket.recv())
    if not isinstance(reply, CommandReply):
        raise MessageError(f"expected a CommandReply from {address}, got a {type(reply).__name__}")
    if not reply.accepted:
        raise MessageError(f"run {run_id!r} refused the command: {reply.reason}")
    return command


def _command_address(target: str | RunInfo, run_id: str, keys: str) -> tuple[str, str, str]:
    if isinstance(target, RunInfo):
        if not target.commands:
            raise ConfigError(f"expected run {target.run_id!r} to take commands, but it announces no inbox")
        return target.commands, target.run_id, keys or target.keys
    if "://" in target:
        if not run_id:
            raise ConfigError(f"expected run_id beside the address {target!r}: a command names its run")
        if not target.startswith("inproc://"):
            check_address(target, to_bind=False, keys=keys)
        return target, run_id, keys
    for run in find_runs():
        if run.run_id == target and run.commands:
            return run.commands, run.run_id, keys or run.keys
    # not announced: within one process it is still reachable
    return inproc_address(target, "commands"), target, keys
