"""Commands into a run: taken at safe points, answered, validated, once."""

from __future__ import annotations

import pickle
import threading
import time

import msgspec
import pytest
import zmq

from esper.errors import ConfigError, MessageError
from esper.messages import Command, CommandReply, Decision, RunRecord
from esper.oona import BusConfig, CommandInbox, RunInfo, decode, encode, find_runs, send_command

DECISION = Decision(
    action="germinate", reason="by hand", policy="manual", site="parallel:fc1", blueprint="widen"
)


class Asker(threading.Thread):
    """Sends a command from another thread, as another process would."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()
        self._arguments = args, options
        self.outcome: Command | Exception | None = None
        self.start()

    def run(self) -> None:
        args, options = self._arguments
        try:
            self.outcome = send_command(*args, **options)  # type: ignore[arg-type]
        except Exception as error:
            self.outcome = error


def serve(inbox: CommandInbox, asker: Asker) -> list[Command]:
    """Poll as a training loop does, until the asker has its answer."""
    commands = []
    while asker.is_alive():
        commands += inbox.poll()
        time.sleep(0.005)
    asker.join()
    return commands


@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_a_command_arrives_and_is_acknowledged(transport: str) -> None:
    with CommandInbox("r", BusConfig(transport=transport)) as inbox:  # type: ignore[arg-type]
        assert inbox.poll() == []
        asker = Asker(find_runs()[0], DECISION)
        commands = serve(inbox, asker)
        assert commands == [asker.outcome]
        assert commands[0].decision == DECISION
        assert inbox.stats.accepted == 1


def test_a_run_is_reached_by_its_id_without_announcement() -> None:
    with CommandInbox("r", BusConfig(announce=False)) as inbox:
        asker = Asker("r", DECISION)
        assert serve(inbox, asker) == [asker.outcome]


def test_a_command_for_another_run_is_refused_with_the_reason() -> None:
    with CommandInbox("r") as inbox:
        asker = Asker(inbox.addresses[1], DECISION, run_id="other")
        assert serve(inbox, asker) == []
        assert isinstance(asker.outcome, MessageError)
        assert "expected a command for run 'r', got one for 'other'" in str(asker.outcome)
        assert inbox.stats.refused == 1


def test_whatever_arrives_is_answered_and_the_inbox_lives_on() -> None:
    with CommandInbox("r", BusConfig(max_message_bytes=1024)) as inbox:
        for parts, reason in [
            ([b"garbage"], "not an esper bus"),
            ([b""], "not an esper bus"),
            ([bytes(2000)], "at most 1024 bytes"),
            ([b"a", b"b"], "one part, got 2"),
            ([encode(RunRecord("r", "note", 1, {}, 1.0))], "expected a Command, got a RunRecord"),
        ]:
            with zmq.Context.instance().socket(zmq.REQ) as socket:
                socket.linger = 0
                socket.connect(inbox.addresses[0])
                socket.send_multipart(parts)
                assert inbox.poll() == []
                assert socket.poll(2000)
                reply = decode(socket.recv())
                assert isinstance(reply, CommandReply)
                assert not reply.accepted
                assert reason in reply.reason
        assert inbox.stats.refused == 5
        asker = Asker("r", DECISION)
        assert len(serve(inbox, asker)) == 1


def test_a_repeated_command_is_handed_out_once() -> None:
    command = Command("r", "c1", DECISION, 1.0)
    with CommandInbox("r") as inbox:
        seen = []
        for expected in ("", "received before"):
            with zmq.Context.instance().socket(zmq.REQ) as socket:
                socket.linger = 0
                socket.connect(inbox.addresses[0])
                socket.send(encode(command))
                seen += inbox.poll()
                assert decode(socket.recv()) == CommandReply("c1", True, expected)
        assert seen == [command]
        assert inbox.stats.repeated == 1


def test_an_asker_that_has_gone_does_not_stall_the_run() -> None:
    with CommandInbox("r") as inbox:
        for number in range(5):
            with zmq.Context.instance().socket(zmq.REQ) as socket:
                socket.linger = 0
                socket.connect(inbox.addresses[0])
                socket.send(encode(Command("r", str(number), DECISION, 1.0)))
        start = time.monotonic()
        inbox.poll()
        assert time.monotonic() - start < 1
        asker = Asker("r", DECISION)
        assert asker.outcome is None or isinstance(asker.outcome, Command)
        assert len(serve(inbox, asker)) >= 1


def test_no_answer_is_a_timeout_that_says_where_to_look() -> None:
    with (
        CommandInbox("r"),
        pytest.raises(TimeoutError, match=r"within 0\.05 s, got none: is it still training"),
    ):
        send_command("r", DECISION, timeout_s=0.05)


def test_a_target_must_be_complete() -> None:
    with pytest.raises(ConfigError, match="expected run_id beside the address"):
        send_command("tcp://127.0.0.1:5", DECISION)
    with pytest.raises(ConfigError, match="loopback only"):
        send_command("tcp://10.0.0.1:5", DECISION, run_id="r")
    with pytest.raises(ConfigError, match="announces no inbox"):
        send_command(RunInfo(run_id="r", pid=1, started=0.0), DECISION)


def test_closed_and_copied_inboxes() -> None:
    inbox = CommandInbox("r").open()
    twin = pickle.loads(pickle.dumps(inbox))
    inbox.close()
    assert inbox.poll() == []
    with twin:
        assert twin.poll() == []
        assert twin.addresses


def test_an_invalid_decision_is_refused_by_the_run() -> None:
    bad = msgspec.structs.replace(DECISION, confidence=3.0)
    with CommandInbox("r") as inbox:
        asker = Asker("r", bad)
        assert serve(inbox, asker) == []
        assert isinstance(asker.outcome, MessageError)
        assert "<= 1.0" in str(asker.outcome)
