"""What Prometheus reads from a run, over HTTP, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import MissingLibraryError
from kitaeru.events import Devices, Notice, Reading, RunFinished
from kitaeru.recipe.types import TrackSection
from kitaeru.report.prometheus import Prometheus
from kitaeru.report.trackers import trackers

DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana" / "kitaeru.json"


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@pytest.fixture
def served() -> Iterator[Prometheus]:
    tracker = Prometheus(free_port())
    yield tracker
    tracker.close()


def read(tracker: Prometheus) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{tracker.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def look(**changes: Any) -> Devices:
    gpu = Reading(
        device="1", name="A5000", utilisation=0.9, memory_bytes=5, memory_total_bytes=10, watts=200.0, celsius=70.0,
        clock_share=0.8, pcie_to_bytes_s=1e9, pcie_from_bytes_s=2e9, **changes,
    )  # fmt: skip
    return Devices(step=3, host="h", readings=(gpu,))


def test_the_latest_numbers_are_served(served: Prometheus, made: Any) -> None:
    before = read(served)
    assert before["kitaeru_loss"] != before["kitaeru_loss"]  # not known yet, which is not zero
    for event in (
        made.started(60),
        *made.events(60, last=24),
        look(throttles=("thermal",)),
        Notice(level="warning", text="hot"),
    ):
        served(event)
    now = read(served)
    last = made.step(24, 60)
    assert now["kitaeru_step"] == 24
    assert now["kitaeru_steps_planned"] == 60
    assert now["kitaeru_running"] == 1
    assert now["kitaeru_loss"] == pytest.approx(last.loss)
    assert now["kitaeru_tokens_total"] == sum(made.step(n, 60).tokens for n in range(1, 25))
    labels = 'device="1",host="h",name="A5000"'
    assert now[f"kitaeru_device_power_watts{{{labels}}}"] == 200
    assert now['kitaeru_device_pcie_bytes_per_second{device="1",direction="from",host="h",name="A5000"}'] == 2e9
    throttled = 'kitaeru_device_throttled{device="1",host="h",name="A5000",reason="thermal"}'
    assert now[throttled] == 1
    assert now['kitaeru_notices_total{level="warning"}'] == 1
    served(look())
    served(RunFinished(outcome="finished", step=60, seconds=1.0))
    assert (read(served)[throttled], read(served)["kitaeru_running"]) == (0, 0)


def test_the_port_is_free_afterwards(served: Prometheus) -> None:
    served.close()
    again = Prometheus(served.port)
    again.close()


def test_a_port_that_is_taken_is_a_notice(served: Prometheus, tmp_path: Path) -> None:
    heard: list[Notice] = []
    section = TrackSection(tensorboard=False, prometheus_port=served.port)
    assert trackers(section, tmp_path, {}, heard.append) == []
    assert str(served.port) in heard[0].text


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingLibraryError, match="prometheus_client") as caught:
        Prometheus(1)
    assert "kitaeru[prometheus]" in str(caught.value)


def test_the_dashboard_asks_for_what_is_served(served: Prometheus, made: Any) -> None:
    for event in (made.started(3), made.step(1, 3), look(throttles=("thermal",)), Notice(level="warning", text="x")):
        served(event)
    from dataclasses import replace

    served(replace(made.step(2, 3), rank_seconds=(0.1, 0.2)))
    known = {re.split(r"[{ ]", name)[0] for name in read(served)}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"kitaeru_\w+", target["expr"])
    }
    assert len(asked) > 15
    assert asked <= known
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
