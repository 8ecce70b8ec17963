"""From signals on a socket to decisions, one cycle after the other, with everything real that is on the way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from esper.bench._soak_host import SoakHost
from esper.errors import EsperError
from esper.messages import TOPICS
from esper.oona import BusConfig, Publisher
from esper.tamiyo.collection import TELEMETRY, CollectionConfig, HealthCollector
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.service.client import ServiceClient
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.network_decider import NetworkDecider
from esper.tamiyo.service.protocol import Answer
from esper.tamiyo.service.server import DecisionServer

if TYPE_CHECKING:
    from esper.tamiyo.graph.data import ModelGraphState

__all__ = ["SoakLoop", "serving", "soak_loop"]

_SIGNALS = 500
_PATIENCE_S = 20.0
_WARM_UP = 50


class SoakLoop:
    """Signals to decisions, one cycle at a time; made by :func:`soak_loop`.

    Attributes:
        answers_ms: How long the service took for its last 1,000 answers.
    """

    def __init__(
        self,
        host: SoakHost,
        publisher: Publisher,
        collector: HealthCollector,
        network: TamiyoNetwork,
        *,
        address: str,
        ask_every: int,
    ) -> None:
        self.host, self.collector = host, collector
        self.answers_ms: deque[float] = deque(maxlen=1000)
        self._publisher, self._ask_every = publisher, ask_every
        self._client = ServiceClient(address, host.run_id)
        self._builder = ModelGraphBuilder()
        self._network = network
        self._adaptations = 0

    async def warm_up(self) -> None:
        """Connect everything, and let what the service remembers of its last questions fill up."""
        for _ in range(_WARM_UP):
            await self.turn(ask=True)

    async def turn(self, *, ask: bool = False) -> float:
        """One cycle; milliseconds from publishing to the decision. ``ask`` the service in any case."""
        began = time.perf_counter()
        wanted = self.collector.statistics.messages
        for message in self.host.messages():
            if not self._publisher.publish(message):
                raise EsperError(f"expected a message to be sent, but: {self._publisher.stats}")
            wanted += 1
        await _until(lambda: self.collector.statistics.messages >= wanted, "the collector to have read all")
        await _until(lambda: not len(self.collector.signal_buffer), "the collector to have processed all")
        signals = await self.collector.get_recent_signals(_SIGNALS, run_id=self.host.run_id)
        facts = self.host.facts()
        state = self._builder.build_model_graph(signals, self.host.topology, run=facts)
        self._adaptations = 0 if self.host.step % 500 == 0 else self._adaptations
        if self._network.make_decision(state, self._adaptations) is not None:
            self._adaptations += 1
        latency_ms = 1000 * (time.perf_counter() - began)
        if ask or self.host.cycle % self._ask_every == 0:
            await self._ask(state)
        return latency_ms

    async def _ask(self, state: ModelGraphState) -> None:
        """Let the service decide the same point."""
        if self._client.run_id != self.host.run_id:  # that run has ended
            self._client.close()
            self._client = ServiceClient(self._client.address, self.host.run_id)
        began = time.perf_counter()
        point = DecisionPoint(
            run=self.host.facts(),
            topology=self.host.topology,
            signals=tuple(state.health_signals),
            candidates=tuple(state.candidates),
            timestamp=state.timestamp,
        )
        request_id = f"{self.host.run_id}:{self.host.step}"
        self._client.ask(request_id, self.host.step, point)
        await _until(lambda: self._client.answered, "the service to answer", pause_s=1e-3)
        for answer in self._client.take():
            if not isinstance(answer, Answer):
                raise EsperError(f"expected a decision of the service, got {answer}")
            self._client.report(request_id, applied=False, refused="a soak applies nothing")
        self.answers_ms.append(1000 * (time.perf_counter() - began))

    def close(self) -> None:
        """Hang up."""
        self._client.close()


@contextlib.asynccontextmanager
async def soak_loop(
    layers: int, ask_every: int, address: str, network: TamiyoNetwork, config: CollectionConfig
) -> AsyncIterator[SoakLoop]:
    """The run, its bus, the collector filled to its limits, and a line to the service."""
    host = SoakHost(layers, "soak")
    with Publisher("soak", BusConfig(transport="ipc", announce=False)) as publisher:
        async with HealthCollector.connect(publisher.addresses[-1], config=config) as collector:
            for topic in TELEMETRY:
                if not publisher.wait_for_subscriber(TOPICS[topic], timeout_s=_PATIENCE_S):
                    raise EsperError(f"expected a subscription to {topic} within {_PATIENCE_S:g} s")
            await _fill(collector, layers)
            loop = SoakLoop(host, publisher, collector, network, address=address, ask_every=ask_every)
            with contextlib.closing(loop):
                yield loop


async def _fill(collector: HealthCollector, layers: int) -> None:
    """Let other runs take up all the room that the collector ever will."""
    config = collector.config
    former = SoakHost(layers, "former")
    num_rounds = (config.max_keys + config.window_size) // (2 * layers) + 1
    for index in range(num_rounds):
        # another run and other seeds each time: all series are new, and the first signal of each passes
        collector.ingest(former.newborn(f"former-{index}"))
        if index % 16 == 0:
            await _until(lambda: not len(collector.signal_buffer), "the collector to be filled")


@contextlib.contextmanager
def serving(folder: Path, decider: str, network: TamiyoNetwork) -> Iterator[str]:
    """A service in a thread of this process; gives its address.

    Args:
        folder: Where its store is.
        decider: As ``esper serve`` takes it; empty: the network.
        network: Decides where ``decider`` is empty.
    """
    config = ServiceConfig(
        address="tcp://127.0.0.1:*", http_address="", store=str(folder / "experience.db"), decider=decider or "wait",
        cycle_ms=0.0, cooldown_s=0.0, max_adaptations=10**9, expiry_s=3600.0,
    )  # fmt: skip
    service = DecisionServer(config, decider=None if decider else NetworkDecider(network))
    thread = threading.Thread(target=service.run, name="soak-service")
    thread.start()
    try:
        yield service.address
    finally:
        service.stop()
        thread.join(_PATIENCE_S)


async def _until(condition: Callable[[], bool], what: str, *, pause_s: float = 2e-4) -> None:
    deadline = time.perf_counter() + _PATIENCE_S
    while not condition():
        if time.perf_counter() > deadline:
            raise EsperError(f"expected {what} within {_PATIENCE_S:g} s")
        await asyncio.sleep(pause_s)
