"""The numbers of a run for Prometheus, through prometheus_client. A Grafana dashboard for them lies in docs/grafana."""

from __future__ import annotations

import math
from typing import Any

from kitaeru.errors import MissingLibraryError
from kitaeru.events import Devices, Evaluated, Event, Notice, Reading, RunFinished, RunStarted, Step
from kitaeru.i18n import tr
from kitaeru.report.wording import run_name

_PREFIX = "kitaeru_"
_GAUGES = {
    "step": "Optimizer steps done",
    "steps_planned": "Steps of the whole run",
    "loss": "Training loss in nats",
    "validation_loss": "Validation loss in nats",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens per second of the last step",
    "mfu_ratio": "Share of the devices' peak spent on arithmetic training cannot do without",
    "step_seconds": "Seconds of the last step",
    "data_seconds": "Seconds of the last step spent on putting data together",
    "wait_seconds": "Seconds of the last step spent on waiting for other devices",
    "idle_ratio": "Share of the last step in which a rank, on average, computed no pass",
    "peak_bytes": "Peak memory of the fullest device",
    "epoch": "Passes over the data",
    "running": "1 while the run goes on",
}
_DEVICE_GAUGES = {
    "device_utilisation_ratio": "utilisation",
    "device_memory_bytes": "memory_bytes",
    "device_memory_total_bytes": "memory_total_bytes",
    "device_power_watts": "watts",
    "device_temperature_celsius": "celsius",
    "device_clock_ratio": "clock_share",
}
_DEVICE = ("host", "device", "name")


class Prometheus:
    """A tracker that serves the latest numbers on `address`:`port`/metrics.

    Raises:
        MissingLibraryError: prometheus_client is not installed.
        OSError: the port is taken.
    """

    name = "Prometheus"

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise MissingLibraryError(
                "prometheus_client", tr("Serving numbers for Prometheus"), "pip install 'kitaeru[prometheus]'"
            ) from error
        self._client: Any = prometheus_client
        registry = prometheus_client.CollectorRegistry()
        gauge, counter = prometheus_client.Gauge, prometheus_client.Counter
        self._info = prometheus_client.Info(_PREFIX + "run", "The run", registry=registry)
        self._gauges: dict[str, Any] = {
            name: gauge(_PREFIX + name, text, registry=registry) for name, text in _GAUGES.items()
        }
        for unknown in self._gauges.values():
            unknown.set(math.nan)
        self._devices: dict[str, Any] = {
            name: gauge(_PREFIX + name, field, _DEVICE, registry=registry) for name, field in _DEVICE_GAUGES.items()
        }
        self._pcie: Any = gauge(
            _PREFIX + "device_pcie_bytes_per_second", "PCIe traffic", (*_DEVICE, "direction"), registry=registry
        )
        self._throttled: Any = gauge(
            _PREFIX + "device_throttled", "1 while the clock is held down", (*_DEVICE, "reason"), registry=registry
        )
        self._ranks: Any = gauge(_PREFIX + "rank_seconds", "Own passes of a rank", ("rank",), registry=registry)
        self._tokens: Any = counter(_PREFIX + "tokens", "Tokens trained on", registry=registry)
        self._notices: Any = counter(_PREFIX + "notices", "Notices", ("level",), registry=registry)
        self._mfu_of_rate = 0.0
        self._reasons: set[tuple[str, ...]] = set()
        self._server, self._thread = prometheus_client.start_http_server(port, addr=address, registry=registry)
        self.port: int = self._server.server_port

    def __call__(self, event: Event) -> None:
        """Take `event` in."""
        match event:
            case RunStarted():
                self._begin(event)
            case Step():
                self._step(event)
            case Evaluated():
                self._gauges["validation_loss"].set(event.loss)
            case Devices():
                for reading in event.readings:
                    self._device(event.host, reading)
            case Notice():
                self._notices.labels(event.level).inc()
            case RunFinished():
                self._gauges["running"].set(0)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _begin(self, event: RunStarted) -> None:
        facts = {"run": run_name(event), "model": event.model, "method": event.method, "strategy": event.strategy}
        self._info.info(facts | {"device": event.device})
        self._mfu_of_rate = event.mfu_of_rate
        for name, value in (("running", 1), ("step", event.resumed_step), ("steps_planned", event.max_steps)):
            self._gauges[name].set(value)

    def _step(self, event: Step) -> None:
        values: dict[str, float | None] = {
            "step": event.step,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens_per_second": event.tokens_per_second,
            "mfu_ratio": event.tokens_per_second * self._mfu_of_rate,
            "step_seconds": event.seconds,
            "data_seconds": event.data_seconds,
            "wait_seconds": event.wait_seconds,
            "idle_ratio": event.idle_share,
            "peak_bytes": event.peak_bytes,
            "epoch": event.epoch,
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
        for rank, seconds in enumerate(event.rank_seconds):
            self._ranks.labels(rank).set(seconds)
        self._tokens.inc(event.tokens)

    def _device(self, host: str, reading: Reading) -> None:
        labels = (host, reading.device, reading.name)
        for name, field in _DEVICE_GAUGES.items():
            value = getattr(reading, field)
            if value is not None:
                self._devices[name].labels(*labels).set(value)
        for direction, value in (("to", reading.pcie_to_bytes_s), ("from", reading.pcie_from_bytes_s)):
            if value is not None:
                self._pcie.labels(*labels, direction).set(value)
        self._reasons |= {(*labels, reason) for reason in reading.throttles}
        for known in self._reasons:
            if known[:-1] == labels:
                self._throttled.labels(*known).set(known[-1] in reading.throttles)
