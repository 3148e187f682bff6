"""Several hosts for real: network namespaces with their own addresses and names, each with a disk of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from kitaeru.events import Evaluated, RunStarted, Step

STEPS, PORT = 40, 29511
SOON = 120  # as in test_devices.py
HOSTS = (f"kt{os.getpid()}a", f"kt{os.getpid()}b")
ADDRESSES = ("10.77.31.1", "10.77.31.2")
TWO = {"strategy": "ddp", "train__max_steps": STEPS, "train__save_every": 5, "limits__max_restarts": 1}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Two hosts joined by a cable."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("making hosts takes iproute2, util-linux and root")
    try:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
            ip("link", "add", HOSTS[0], "type", "veth", "peer", "name", HOSTS[1])
            for host, address in zip(HOSTS, ADDRESSES, strict=True):
                ip("link", "set", host, "netns", host)
                ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
                ip("-n", host, "link", "set", "lo", "up")
                ip("-n", host, "link", "set", host, "up")
            ip("netns", "exec", HOSTS[0], "unshare", "--uts", "true")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


@pytest.fixture(scope="module")
def one(new_folder, tmp_path_factory):
    """The run on one device."""
    folder = new_folder(tmp_path_factory.mktemp("hosts") / "one", train__max_steps=STEPS)
    folder.train()
    return folder


class Pair:
    """A run on both hosts, each in a folder of its own."""

    def __init__(self, new_folder, path, **changes) -> None:
        self.folders = [new_folder(path / name, **changes) for name in "ab"]
        self.started = [self.start(number) for number in range(2)]

    def start(self, number: int, *more: str):
        words = ("--nodes", "2", "--node-rank", str(number), "--master", f"{ADDRESSES[0]}:{PORT}", *more)
        return self.folders[number].start(*words, host=HOSTS[number])

    @property
    def first(self):
        return self.folders[0]

    def said(self, number: int) -> str:
        return " ".join(self.started[number].said.split())

    def until(self, number: int, text: str, seconds: float) -> None:
        """Until a host has said something."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if text in self.said(number):
                return
            time.sleep(0.1)
        raise AssertionError(f"host {number} has not said {text!r} in {seconds} s: {self.said(number)}")

    def wait(self) -> list[int]:
        codes = [started.wait() for started in self.started]
        for started in self.started:
            started.assert_nobody_left()
        assert_port_is_free()
        return codes


def assert_port_is_free() -> None:
    held = subprocess.run(["ip", "netns", "exec", HOSTS[0], "cat", "/proc/net/tcp"], capture_output=True, text=True)
    listening = [line for line in held.stdout.splitlines() if f":{PORT:04X} " in line and " 0A " in line]
    assert not listening


def assert_same(folder, wanted) -> None:
    steps = folder.events(Step)
    assert [event.step for event in steps] == list(range(1, STEPS + 1))
    assert [e.loss for e in steps] == pytest.approx([e.loss for e in wanted.events(Step)], rel=1e-5)
    ours, theirs = ([e.loss for e in f.events(Evaluated)] for f in (folder, wanted))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("how", ["cable", "power"])
def test_a_host_that_is_cut_off_is_named_and_comes_back(network, one, new_folder, tmp_path, how):
    pair = Pair(new_folder, tmp_path, **TWO)
    pair.first.wait_for("step", pair.started[0], count=12)
    if how == "cable":
        ip("-n", HOSTS[0], "link", "set", HOSTS[0], "down")
        pair.until(1, f"Rank 0 on {HOSTS[0]} is lost after step", SOON)
        assert "this one is cut off" in pair.said(1)
    else:
        os.killpg(pair.started[1].pid, signal.SIGKILL)
        assert pair.started[1].wait() == -signal.SIGKILL
    pair.until(0, f"Rank 1 on {HOSTS[1]} is lost after step", SOON)
    assert "no sign of life" in pair.said(0)
    assert "its host is down, or cut off from the network" in pair.said(0)
    if how == "cable":
        ip("-n", HOSTS[0], "link", "set", HOSTS[0], "up")
    else:
        pair.started[1] = pair.start(1)
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert_same(pair.first, one)
    starts = pair.first.events(RunStarted)
    assert [event.resumed_step == 0 for event in starts] == [True, False]
    assert not (pair.folders[1].run / "checkpoints").exists()  # no disk is shared
    assert (pair.folders[1].run / "plan.json").read_bytes() == (pair.first.run / "plan.json").read_bytes()


def test_a_copy_on_each_host_cut_among_its_processes(network, one, new_folder, tmp_path):
    """HSDP: four ranks, two on a host, each host with a copy in two pieces."""
    changes = {"strategy": "fsdp", "limits__devices": 4, "limits__split_over": 2}
    pair = Pair(new_folder, tmp_path, **(TWO | changes))
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert_same(pair.first, one)
    layout = json.loads((pair.folders[1].run / "plan.json").read_text())["chosen"]["layout"]
    assert (layout["strategy"], layout["devices"], layout["shards"]) == ("fsdp", 4, 2)
    assert sorted(path.name for path in (pair.folders[1].run / "logs").glob("*.json")) == ["rank-2.json", "rank-3.json"]


def test_without_restarts_both_hosts_end_and_the_run_goes_on_with_resume(network, one, new_folder, tmp_path):
    pair = Pair(new_folder, tmp_path, **(TWO | {"limits__max_restarts": 0}))
    pair.first.wait_for("step", pair.started[0], count=12)
    record = pair.folders[1].run / "logs" / "rank-1.json"
    began = time.monotonic()
    os.kill(int(record.read_text().split('"pid": ')[1].split(",")[0]), signal.SIGKILL)
    assert pair.wait() == [1, 1], pair.said(0) + pair.said(1)
    assert time.monotonic() - began < SOON
    for number in range(2):
        assert f"Rank 1 on {HOSTS[1]} is lost after step" in pair.said(number)
        assert "ran out of RAM" in pair.said(number)
    pair.started = [pair.start(number, "--resume") for number in range(2)]
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert_same(pair.first, one)


def test_a_host_with_other_data_is_refused(network, new_folder, tmp_path):
    pair = Pair(new_folder, tmp_path, **TWO)
    # The second reads its file when it has the plan, which takes seconds.
    lines = (pair.folders[1].path / "train.jsonl").read_text().splitlines()
    (pair.folders[1].path / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    codes = pair.wait()
    assert codes[0] != 0
    assert f"The training data on {HOSTS[1]} is not that on {HOSTS[0]}" in pair.said(0) + pair.said(1)


def test_a_port_that_is_taken_is_named(new_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = ("--nodes", "2", "--node-rank", "0", "--master", address)
        said = new_folder(tmp_path, **TWO).train(*words, code=2)
    assert address in said
    assert "free" in said
