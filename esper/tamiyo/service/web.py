"""/healthz, /readyz and /metrics over HTTP, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from esper.errors import ConfigError, MissingExtraError
from esper.tamiyo.service.stats import ServiceStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Watched", "Web"]


class Watched(Protocol):
    """What the pages tell of."""

    stats: ServiceStats

    @property
    def alive(self) -> bool:
        """Whether the loop turns."""

    @property
    def unready(self) -> str:
        """Why requests are not decided now; empty when they are."""

    @property
    def keys_refused(self) -> int:
        """Handshakes of unknown keys."""


class Web:
    """Serves the pages from threads of its own, from entering to leaving.

    Args:
        host: Loopback.
        port: 0 picks a free one.
        watched: The service.

    Raises:
        MissingExtraError: ``prometheus_client`` is not installed.
        ConfigError: The port is taken.
    """

    def __init__(self, host: str, port: int, watched: Watched) -> None:
        try:
            from prometheus_client import CollectorRegistry, generate_latest
            from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
        except ImportError as error:
            raise MissingExtraError(
                'expected prometheus_client for /metrics, but it is not installed: pip install "esper[serve]", or set '
                "http_address to nothing"
            ) from error
        registry = CollectorRegistry()
        registry.register(_Collector(watched))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._reply(200, generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4)
                elif self.path == "/healthz":
                    self._reply(*((200, b"ok\n") if watched.alive else (503, b"the loop stands still\n")))
                elif self.path == "/readyz":
                    why = watched.unready
                    self._reply(503 if why else 200, f"{why or 'ok'}\n".encode())
                else:
                    self._reply(404, b"/healthz, /readyz, /metrics\n")

            def _reply(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes every few seconds are no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"expected to serve HTTP on {host}:{port}, but: {error}; choose another http_address"
            ) from error
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Collector:
    """Turns the service's counts into Prometheus's metrics when it is asked for them."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        """Every metric once."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats = self._watched.stats
        for name, text, label, counts in (
            ("esper_decisions", "Decisions, by action that was answered", "action", stats.decisions),
            ("esper_gated", "Choices that a gate turned into WAIT, by gate", "gate", stats.gated),
            ("esper_refusals", "Requests that were refused, by cause", "cause", stats.refusals),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in sorted(counts.copy().items()):
                family.add_metric([value], count)
            yield family
        for name, text, number in (
            ("esper_abstentions", "Answers for which the decider fell back", stats.abstentions),
            ("esper_repeats", "Requests that had been answered before", stats.repeats),
            ("esper_busy", "Requests that found the queue full", stats.busy),
            ("esper_reports", "Outcomes that runs told", stats.reports),
            ("esper_expired_runs", "Runs that fell silent", stats.expired),
            ("esper_rounds", "Passes of the decider", stats.rounds),
            ("esper_keys_refused", "Handshakes of unknown keys", self._watched.keys_refused),
        ):
            yield CounterMetricFamily(name, text, value=number)
        yield GaugeMetricFamily("esper_runs", "Runs registered now", value=stats.num_runs)
        yield GaugeMetricFamily("esper_queue_length", "Requests in the queue now", value=stats.num_waiting)
        yield GaugeMetricFamily(
            "esper_ready", "Whether requests are decided now", value=not self._watched.unready
        )
        for name, text, histogram in (
            (
                "esper_decision_latency_seconds",
                "From a request's arrival to its stored answer",
                stats.latency,
            ),
            ("esper_round_seconds", "One pass of the decider, storing included", stats.round_time),
        ):
            yield HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.sum_s)
