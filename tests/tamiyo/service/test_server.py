"""The service with real sockets, in threads and in processes of its own: whatever goes wrong, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import zmq
from service_points import make_point, make_topology
from service_threads import QUICK, serving, wait_for

from esper.errors import ConfigError, MissingExtraError
from esper.oona.keys import create_keys, trust_client, trust_server
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.service.client import ServiceClient
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.protocol import Answer, Hello, Refusal, read_reply, topology_hash, write
from esper.tamiyo.service.server import DecisionServer


def decide(client: ServiceClient, step: int, *, run: str = "run", **point: Any) -> Answer | Refusal:
    client.ask(f"{run}:{step}", step, make_point(run, step, **point))
    wait_for(lambda: client.answered, f"an answer ({client.state})")
    (answer,) = client.take()
    return answer


def test_a_run_asks_and_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ServiceClient(service.address, "run") as client:
        assert client.state == "not connected"
        answer = decide(client, 1)
        assert isinstance(answer, Answer)
        assert make_point().candidates[answer.candidate].placements[0].source == "net.0"
        assert client.state == f"connected to {service.address}"
        client.report("run:1", applied=True, seed_ids=("seed-1",))
        stored = wait_for(
            lambda: (found := service.desk.book.store.get("run:1")).seed_ids and found, "the report"
        )
        assert stored.seed_ids == ("seed-1",)
    assert client.state == "not connected"


def test_two_runs_are_served_at_once_each_in_its_order(tmp_path: Path) -> None:
    with serving(tmp_path, cycle_ms=5.0) as service:
        with contextlib.ExitStack() as stack:
            names = ("a", "b")
            clients = {n: stack.enter_context(ServiceClient(service.address, n)) for n in names}
            for step in range(1, 9):
                for name, client in clients.items():
                    client.ask(f"{name}:{step}", step, make_point(name, step))
                for name, client in clients.items():
                    wait_for(lambda c=client: c.answered, "an answer")
                    assert [a.request_id for a in client.take()] == [f"{name}:{step}"]
        wait_for(lambda: service.stats.num_runs == 0, "both to leave")
    with ExperienceStore(tmp_path / "x.db", readonly=True) as store:
        for name in names:
            stored = [e.decision.decision_id for e in store.iterate(run_id=name)]
            assert stored == [f"{name}:{step}" for step in range(1, 9)]


def test_frames_that_are_none_are_refused_and_counted_and_nobody_else_notices(tmp_path: Path) -> None:
    with (
        serving(tmp_path, max_message_bytes=100_000) as service,
        ServiceClient(service.address, "run") as client,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.linger = 0
        socket.connect(service.address)
        for data, cause in ((b"noise", "malformed"), (b"ESPT\0\1" + bytes(100_001), "oversized"),
                            (b"ESPT\0\7", "version"), (b"", "malformed")):  # fmt: skip
            socket.send(data)
            assert socket.poll(5000)
            reply = read_reply(socket.recv())
            assert isinstance(reply, Refusal)
            assert reply.cause == cause
        socket.send_multipart([b"two", b"parts"])
        assert socket.poll(5000)
        assert service.stats.refusals == {"malformed": 3, "oversized": 1, "version": 1}
        assert isinstance(decide(client, 1), Answer)
        big = decide(
            client, 2, num_signals=300
        )  # refused by its own client: the service has said how much it takes
        assert isinstance(big, Refusal)
        assert big.cause == "oversized"


def test_a_full_queue_is_waited_for_and_not_forced(tmp_path: Path) -> None:
    with (
        serving(tmp_path, max_queue=1, cycle_ms=150.0, retry_after_ms=20) as service,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(ServiceClient(service.address, f"r{i}")) for i in range(4)]
        for step in (1, 2):
            for i, client in enumerate(clients):
                client.ask(f"r{i}:{step}", step, make_point(f"r{i}", step))
            for client in clients:
                wait_for(lambda c=client: c.answered, "an answer")
                assert all(isinstance(answer, Answer) for answer in client.take())
        assert service.stats.busy > 0
        assert len(service.desk.book.store) == 8  # type: ignore[attr-defined]


def test_stopping_answers_what_is_queued(tmp_path: Path) -> None:
    with serving(tmp_path, cycle_ms=60_000.0) as service, ServiceClient(service.address, "run") as client:
        assert isinstance(decide(client, 1), Answer)
        client.ask("run:2", 2, make_point("run", 2))  # its turn would come in a minute
        wait_for(lambda: service.stats.num_waiting == 1, "the queue")
        service.stop()
        wait_for(lambda: client.answered, "the answer")
        assert [a.request_id for a in client.take()] == ["run:2"]


def test_an_address_in_use_is_said(tmp_path: Path) -> None:
    with serving(tmp_path) as service, pytest.raises(ConfigError, match="Address already in use"):
        DecisionServer(
            ServiceConfig(**(QUICK | {"address": service.address, "store": str(tmp_path / "y.db")}))
        )


def test_a_socket_file_serves_one_and_is_gone_afterwards(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="esper-") as short:
        address = f"ipc://{short}/s"
        with serving(tmp_path, address=address), ServiceClient(address, "run") as client:
            assert isinstance(decide(client, 1), Answer)
            with pytest.raises(ConfigError, match="Address already in use"):
                DecisionServer(
                    ServiceConfig(**(QUICK | {"address": address, "store": str(tmp_path / "y.db")}))
                )
        assert not os.listdir(short)


def test_metrics_without_their_extra_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("prometheus_client", "prometheus_client.exposition"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    settings = QUICK | {"store": str(tmp_path / "x.db"), "http_address": "127.0.0.1:0"}
    with pytest.raises(MissingExtraError, match=r'pip install "esper\[serve\]"'):
        DecisionServer(ServiceConfig(**settings))
    with serving(tmp_path) as service, ServiceClient(service.address, "run") as client:
        assert isinstance(decide(client, 1), Answer)  # without /metrics nothing needs it


def test_health_and_metrics_are_served(tmp_path: Path) -> None:
    def get(path: str) -> tuple[int, str]:
        assert service.web is not None
        try:
            with urllib.request.urlopen(service.web.url + path, timeout=5) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with serving(tmp_path, http_address="127.0.0.1:0", cooldown_s=60.0) as service:
        with ServiceClient(service.address, "run") as client:
            decide(client, 1)
            decide(client, 2)
            assert get("/healthz") == (200, "ok\n")
            assert get("/readyz") == (200, "ok\n")
            assert get("/etc/passwd")[0] == 404
            status, text = get("/metrics")
            assert status == 200
            figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            assert figures['esper_decisions_total{action="grow"}'] == "1.0"
            assert figures['esper_decisions_total{action="wait"}'] == "1.0"
            assert figures['esper_gated_total{gate="cooldown"}'] == "1.0"
            assert figures['esper_decision_latency_seconds_bucket{le="+Inf"}'] == "2.0"
            assert figures["esper_runs"] == "1.0"
            assert figures["esper_ready"] == "1.0"
        service.desk.store_works = False
        assert get("/readyz") == (503, "the store does not work\n")


def test_keys_let_known_runs_in_and_say_to_others_what_to_do(tmp_path: Path) -> None:
    here, known, unknown = (create_keys(tmp_path / name) for name in ("here", "known", "unknown"))
    trust_client(here.folder, known.public.decode(), "known")
    for visitor in (known, unknown):
        trust_server(visitor.folder, here.public.decode())
    with serving(tmp_path, keys=str(here.folder), address="tcp://0.0.0.0:*") as service:
        address = service.address.replace("0.0.0.0", "127.0.0.1")
        with ServiceClient(address, "run", keys=str(known.folder)) as client:
            assert isinstance(decide(client, 1), Answer)
        with ServiceClient(address, "run", keys=str(unknown.folder)) as client:
            client.ask("run:2", 2, make_point("run", 2))
            wait_for(lambda: "does not know this run's key" in client.state, "the refusal")
            assert not client.answered
        with ServiceClient(address, "run") as client:
            client.ask("run:3", 3, make_point("run", 3))
            time.sleep(0.2)
            assert not client.answered
        assert service.keys_refused >= 1
        assert sum(service.stats.decisions.values()) == 1


def test_beyond_loopback_without_keys_nothing_is_bound_or_reached() -> None:
    with pytest.raises(ConfigError, match="esper keys create"):
        ServiceConfig(address="tcp://0.0.0.0:7350")
    with pytest.raises(ConfigError, match="esper keys create"):
        ServiceClient("tcp://192.0.2.1:7350", "run")


def test_a_client_is_silent_in_a_forked_child_and_travels_by_pickle(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ServiceClient(service.address, "run") as client:
        assert isinstance(decide(client, 1), Answer)
        copy = pickle.loads(pickle.dumps(client))
        child = os.fork()
        if child == 0:
            client.ask("run:2", 2, make_point("run", 2))
            silent = client.state == "not connected" and not client.answered
            client.close()
            os._exit(0 if silent else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert isinstance(decide(client, 3), Answer)
        with copy:
            assert isinstance(decide(copy, 4), Answer)
        assert service.stats.decisions.total() == 3


def test_a_run_that_cannot_be_heard_is_forgotten_and_registers_again(tmp_path: Path) -> None:
    with serving(tmp_path, heartbeat_s=0.2, expiry_s=0.4) as service:
        with zmq.Context() as context, context.socket(zmq.DEALER) as mute:
            mute.linger = 0
            mute.connect(service.address)
            mute.send(write(Hello(run_id="mute", topology=topology_hash(make_topology()))))
            wait_for(lambda: service.stats.expired == 1, "its expiry")
        with ServiceClient(service.address, "run") as client:
            decide(client, 1)
            time.sleep(0.6)
            assert service.stats.num_runs == 1  # heartbeats keep it
            assert service.desk.runs.get("run") is not None
            service.desk.runs.remove("run")
            assert isinstance(decide(client, 2), Answer)
