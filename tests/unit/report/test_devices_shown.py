"""Devices and waiting, in the live view, in plain lines and in TensorBoard."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kitaeru.events import Devices, Reading
from kitaeru.report.live import LiveView, live_view
from kitaeru.report.metrics import metrics
from kitaeru.report.tensorboard import TensorBoard

GPU = Reading(
    device="0", name="A5000", utilisation=0.97, memory_bytes=20 * 10**9, memory_total_bytes=25 * 10**9, watts=225.0,
    celsius=70.0, clock_share=0.91, pcie_to_bytes_s=1.5e9,
)  # fmt: skip
HOST = Reading(device="host", name="32 threads", used=False, utilisation=0.21)


def look(host: str = "here", **changes: Any) -> Devices:
    return Devices(step=4, host=host, readings=(replace(GPU, **changes), HOST))


def shown(made: Any, *events: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view = LiveView(console)
    for event in (replace(made.started(9), mfu_of_rate=1e-4), *events):
        view(event)
    with console.capture() as caught:
        console.print(view.render())
    return caught.get()


def test_a_line_for_each_device(made: Any) -> None:
    text = shown(made, look())
    assert "GPU 0  97 % · 20.0 GB / 25.0 GB · 225 W · 70 °C · clock 91 % · PCIe 1.50 GB/s" in text
    assert "CPU    21 %" in text
    assert "97 %" not in shown(made, look(), look(utilisation=0.5))


def test_hosts_are_named_where_there_are_several(made: Any) -> None:
    text = shown(made, look("first"), look("second"))
    assert "first GPU 0" in text
    assert "second CPU" in text


@pytest.mark.parametrize("width", [40, 60, 80])
def test_it_fits(made: Any, width: int) -> None:
    step = replace(made.step(4, 9), rank_seconds=(0.4, 0.5), data_seconds=0.1, wait_seconds=0.05)
    text = shown(made, step, look(), width=width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_mfu_and_what_a_step_waits_for(made: Any) -> None:
    step = replace(
        made.step(4, 9),
        seconds=1.0,
        tokens_per_second=4000.0,
        rank_seconds=(0.4, 0.5),
        data_seconds=0.1,
        wait_seconds=0.25,
    )
    text = shown(made, step)
    assert "40.0 %" in text
    assert "data 10.0 %, others 25.0 %" in text
    assert "waiting" not in shown(made, made.step(4, 9))


def test_plain_lines_do_not_flood(made: Any) -> None:
    out = io.StringIO()
    view = live_view(Console(file=out, width=200), plain=True)
    for _ in range(5):
        view(look(throttles=("thermal",)))
    [line] = out.getvalue().splitlines()
    assert line.startswith("[here]  GPU 0 97 %")
    assert "thermal" in line


def test_trackers_get_numbers_by_device(made: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = metrics(look())
    assert values["devices/0/watts"] == 225
    assert "devices/host/watts" not in values
    board = TensorBoard(tmp_path, {})
    step = replace(made.step(4, 9), tokens_per_second=4000.0, rank_seconds=(0.4,), data_seconds=0.1)
    for event in (replace(made.started(9), mfu_of_rate=1e-4), step, look()):
        board(event)
    board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    [mfu] = read.Scalars("train/mfu")
    assert (mfu.step, mfu.value) == (4, pytest.approx(0.4))
    assert read.Scalars("devices/0/utilisation")[0].value == pytest.approx(0.97)
    assert read.Scalars("train/data_seconds")[0].value == pytest.approx(0.1)
