"""The service under many runs at once: real sockets, simulated messages.

``esper serve`` is started as a process of its own, with a policy network of the default size (fresh weights: what
they are does not change what they cost) and its experiences on disk. So many clients, each with its thread and
socket as a training has it, send decision points of a host of so many layers once a second, spread over the second,
and measure from the call to the answer in their hands. Points differ from one to the next, as they do in a run.

Caveat: clients and service share the machine, as they would not in use; where other work keeps the processors busy,
the tail is theirs; ``cpu_ms`` tells what a decision costs whoever else is at work.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from esper.errors import EsperError
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts
from esper.tamiyo.service.client import ServiceClient
from esper.tamiyo.service.protocol import Answer

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "The service: latency of decisions for many concurrent runs"
TARGETS: dict[str, tuple[str, float]] = {"p99_ms": ("<=", 100.0), "unanswered": ("<=", 0.0)}

_START_S = 120.0
_ANSWER_S = 30.0
_CANDIDATES = 32
_SIGNALS_PER_LAYER = 20


def run(
    *,
    runs: int = 32,
    seconds: float = 30.0,
    layers: int = 16,
    interval_s: float = 1.0,
    decider: str = "network",
) -> dict[str, float]:
    """Measure.

    Args:
        runs: Concurrent clients.
        seconds: How long each of them asks.
        layers: Of the hosts.
        interval_s: Seconds between two requests of one client.
        decider: ``network``, or what :class:`~esper.tamiyo.service.config.ServiceConfig` takes.

    Returns:
        ``p50_ms``, ``p90_ms``, ``p99_ms``, ``max_ms`` from request to answer in the client, ``decisions``,
        ``decisions_per_s``, ``unanswered``, ``per_pass`` (requests that one pass decided, on average),
        ``service_p99_ms`` (upper bound of the histogram bin, from arrival to stored answer) and ``cpu_ms`` (processor
        time of the service a decision; nan where the operating system does not tell).

    Raises:
        EsperError: The service did not start, or answered nothing.
    """
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder, ExitStack() as stack:
        address, metrics, pid = stack.enter_context(_served(Path(folder), decider))
        askers = [_Asker(address, index, runs, layers, interval_s, seconds) for index in range(runs)]
        for asker in askers:
            asker.start()
        time.sleep(2.0)  # until all are registered
        before_s = _processor_s(pid)
        for asker in askers:
            asker.join()
        spent_s = _processor_s(pid) - before_s
        figures = _read_metrics(metrics)
    latencies = sorted(latency for asker in askers for latency in asker.latencies_ms)
    if len(latencies) < 2:
        raise EsperError(f"expected answers from the service, got {len(latencies)}: {askers[0].client!r}")
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "p50_ms": cuts[49],
        "p90_ms": cuts[89],
        "p99_ms": cuts[98],
        "max_ms": latencies[-1],
        "decisions": float(len(latencies)),
        "decisions_per_s": len(latencies) / seconds,
        "unanswered": float(sum(asker.unanswered for asker in askers)),
        **figures,
        "cpu_ms": 1000.0 * spent_s / len(latencies),
    }


class _Asker(threading.Thread):
    """One simulated run."""

    def __init__(
        self, address: str, index: int, runs: int, layers: int, interval_s: float, seconds: float
    ) -> None:
        super().__init__(name=f"bench-run-{index}")
        self.run_id = f"bench-{index}"
        self.client = ServiceClient(address, self.run_id)
        self.latencies_ms: list[float] = []
        self.unanswered = 0
        self._phase_s = interval_s * index / runs
        self._interval_s, self._seconds = interval_s, seconds
        self._point = _point(self.run_id, layers)

    def run(self) -> None:
        """Ask on the beat; the first request, which registers the run, is not counted."""
        with self.client:
            begun = time.perf_counter() + 2.0 + self._phase_s
            self._ask(0)
            count = 0
            while (due := begun + count * self._interval_s) < begun + self._seconds:
                time.sleep(max(0.0, due - time.perf_counter()))
                count += 1
                latency_ms = self._ask(count)
                if latency_ms is None:
                    self.unanswered += 1
                else:
                    self.latencies_ms.append(latency_ms)

    def _ask(self, count: int) -> float | None:
        facts = msgspec.structs.replace(self._point.run, step=1000 + count)
        point = msgspec.structs.replace(self._point, run=facts, timestamp=time.time())
        begun = time.perf_counter()
        self.client.ask(f"{self.run_id}:{facts.step}", count + 1, point)
        while time.perf_counter() - begun < _ANSWER_S:
            if self.client.answered:
                (reply,) = self.client.take()
                return 1000 * (time.perf_counter() - begun) if isinstance(reply, Answer) else None
            time.sleep(5e-4)
        return None


@contextmanager
def _served(folder: Path, decider: str) -> Iterator[tuple[str, str, int]]:
    """``esper serve`` in a process of its own; yields its address, that of its metrics, and its process id."""
    if decider == "network":
        decider = str(folder / "network.safetensors")
        _save_network(Path(decider))
    settings = {
        "address": "tcp://127.0.0.1:*",
        "http_address": "127.0.0.1:0",
        "store": str(folder / "experience.db"),
        "decider": decider,
    }
    command = [sys.executable, "-m", "esper.cli", "serve"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            killer = threading.Timer(_START_S, process.kill)
            killer.start()
            words = process.stdout.readline().replace(",", " ").replace(";", " ").split()
            killer.cancel()
            addresses = [word for word in words if "://" in word]
            if len(addresses) != 2:
                raise EsperError(
                    f"expected the service to start within {_START_S:g} s, got {' '.join(words)!r}"
                )
            yield addresses[0], addresses[1], process.pid
        finally:
            process.terminate()


def _save_network(path: Path) -> None:
    import torch

    from esper.tamiyo.network.config import PolicyConfig
    from esper.tamiyo.network.network import TamiyoNetwork
    from esper.tamiyo.network.weights import save_network

    torch.manual_seed(0)
    save_network(TamiyoNetwork(PolicyConfig()), path, card="Fresh weights, for measuring time.")


def _processor_s(pid: int) -> float:
    """Processor time of a process so far, where there is a /proc."""
    path = Path(f"/proc/{pid}/stat")
    if not path.is_file():
        return math.nan
    fields = path.read_text().rpartition(")")[2].split()  # the name in front may hold spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read_metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[:1] != "#"]
    values = {name: float(value) for name, value in lines}
    name = "esper_decision_latency_seconds"
    count = values[f"{name}_count"]
    bins = [(key, value) for key, value in values.items() if key.startswith(f"{name}_bucket")]
    bound = next(key.split('"')[1] for key, value in bins if value >= 0.99 * count)
    return {
        "per_pass": count / max(1.0, values["esper_rounds_total"]),
        "service_p99_ms": 1000.0 * float(bound.replace("+Inf", "inf")),
    }


def _point(run_id: str, layers: int) -> DecisionPoint:
    """A decision point of an MLP with a neck, as full as that of a run that has gone on for a while."""
    widths = [64, *(64 if index % 5 else 16 for index in range(layers - 1)), 10]
    infos = tuple(
        LayerInfo(
            f"net.{i}", "Linear", (widths[i],), (widths[i + 1],), (widths[i] + 1) * widths[i + 1],
            2 * widths[i] * widths[i + 1], 1, is_output=i == layers - 1, reads_input=i == 0,
        )
        for i in range(layers)
    )  # fmt: skip
    edges = tuple(Edge(f"net.{i}", f"net.{i + 1}", ("relu",)) for i in range(layers - 1))
    topology = ModelTopology(infos, edges, {}, sum(info.num_parameters for info in infos))
    growths = [
        Candidate(
            action="grow",
            placements=(
                Placement(
                    site=f"bypass:net.{i}->net.{i + 1}", source=f"net.{i}", target=f"net.{i + 1}", kind="bypass",
                    blueprint="widen", size=size, score=0.1, score_excess=0.05, score_z=3.0,
                ),
            ),
            parameters=size * 130,
            flops=size * 256,
        )
        for i in range(layers - 1)
        for size in (8, 32)
    ]  # fmt: skip
    num_parameters = topology.num_parameters
    return DecisionPoint(
        run=RunFacts(
            run_id=run_id,
            step=0,
            total_steps=10_000,
            epoch=1,
            host_parameters=num_parameters,
            num_parameters=num_parameters,
            parameters_left=num_parameters,
            flops_left=float("inf"),
            germinations_left=8,
            tokens_per_parameter=20.0,
            transformer=False,
            window_open=True,
            price=0.03,
            steps=tuple(range(0, 1000, 50)),
            train_losses=tuple(2.0 / (1 + 0.1 * i) for i in range(20)),
            held_out_loss=0.7,
        ),
        topology=topology,
        signals=tuple(
            HealthSignal(
                layer_id=f"net.{i}", seed_id="", chunk_id=0, epoch=0, step=step, activation_variance=0.5,
                dead_neuron_ratio=0.1, dormancy=0.1, avg_correlation=0.2, effective_rank=9.0, gradient_norm=0.1,
                gradient_snr=1.0, update_ratio=1e-3, expressivity=0.1, is_ready_for_transition=False,
                health_score=0.8, execution_latency=0.2, error_count=0, active_seeds=0, total_seeds=0,
                timestamp=float(step),
            )
            for step in range(1000 - 50 * _SIGNALS_PER_LAYER, 1000, 50)
            for i in range(layers)
        ),
        candidates=(WAIT, *growths[: _CANDIDATES - 1]),
    )  # fmt: skip
