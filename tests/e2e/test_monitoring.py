"""A real run looks at its devices, serves its numbers, and can be followed from another process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from kitaeru.events import Devices, RunStarted, Step


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def test_a_run_that_is_looked_at(new_folder, tmp_path):
    port = free_port()
    folder = new_folder(
        tmp_path,
        train__max_steps=4000,
        train__eval_every=4000,
        train__save_every=4000,
        track__device_seconds=0.2,
        track__prometheus_port=port,
        track__power_price=31,
        track__machine_watts=90,
    )
    started = folder.start()
    folder.wait_for("devices", started, count=3)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        served = answer.read().decode()
    assert "kitaeru_running 1.0" in served
    assert 'kitaeru_device_memory_bytes{device="host"' in served
    # Another process follows it until it has ended.
    follower = subprocess.Popen(
        [sys.executable, "-m", "kitaeru", "monitor", "run"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    time.sleep(2)
    assert follower.poll() is None
    os.kill(started.pid, signal.SIGINT)
    assert started.wait() == 130, started.said
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "step " in said
    assert "]  CPU" in said
    assert "interrupted, can be resumed" in said
    looks = folder.events(Devices)
    assert all(look.readings[-1].device == "host" for look in looks)
    assert any((look.readings[-1].utilisation or 0) > 0 for look in looks)
    assert folder.events(RunStarted)[0].mfu_of_rate > 0
    steps = folder.events(Step)
    assert all(0 < step.rank_seconds[0] <= step.seconds for step in steps)
    page = (folder.run / "report.html").read_text(encoding="utf-8")
    assert "Devices, power and time" in page
    assert "A million tokens" in page
