"""Measuring a machine: on its CPU, with little of everything."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from kitaeru.cli import bench as command
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.machine import calibration, measure
from kitaeru.machine.calibration import Effort, calibrate
from kitaeru.machine.links import measure_links
from kitaeru.machine.measure import Bench
from kitaeru.machine.probe import probe
from kitaeru.plan.calibrate import Profile, cpu_key, profile_path
from kitaeru.plan.choose import make_plan
from kitaeru.plan.rates import cpu_rates, device_rates, link_rates
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

TINY = ModelShape("llama", 64, 128, 2, 4, 2, 16, 512)
WISH = Recipe.model_validate({"model": "m", "data": {"train": "d", "seq_len": 256}})


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Little effort, small products, and a data folder of the test's own."""
    monkeypatch.setattr(calibration, "EFFORTS", {False: Effort(0.01, 0.005), True: Effort(0.01, 0.005)})
    monkeypatch.setattr(measure, "CPU_SIZES", ((16, 64), (64, 128)))
    monkeypatch.setenv("KITAERU_DATA", str(tmp_path))
    return profile_path()


def cpu_only() -> Hardware:
    found = probe()
    return Hardware(cpu_cores=found.cpu_cores, cpu_name=found.cpu_name, host_ram_bytes=1 << 34, host_free_bytes=1 << 34)


def test_a_call_is_timed() -> None:
    took: list[float] = []

    def call() -> None:
        started = time.perf_counter()
        time.sleep(0.004)  # or longer, where the machine is busy
        took.append(time.perf_counter() - started)

    found = Bench(torch.device("cpu"), 0.1, quick=True).time(call)
    assert len(took) > 5
    assert min(took) <= found <= max(took) + 0.001


def test_the_planner_takes_what_was_measured_and_says_so(little: Path) -> None:
    here = cpu_only()
    before = make_plan(WISH, here, TINY)
    told: list[str] = []
    profile = calibrate(here, little, links=False, tell=lambda title, done, total: told.append(f"{done}/{total}"))
    assert told == [f"{number}/7" for number in range(7)]
    assert Profile.load(little) == profile
    assert not little.with_name("profile.partial.json").exists()
    found = profile.devices[cpu_key(here.cpu_name, here.cpu_cores)]
    assert set(found.products) == {"bf16", "fp32"}
    assert set(found.products["fp32"]) == {(16, 64), (16, 128), (64, 64), (64, 128)}
    numbers = (
        found.stream_gb_s,
        found.eager_gb_s,
        found.host_memory_gb_s,
        found.operation_seconds,
        found.skinny_tflops,
    )
    assert all(number > 0 for number in (*numbers, *found.attention_tflops(256, "attention")))
    after = make_plan(WISH, here, TINY)
    assert before.chosen.speed is not None
    assert after.chosen.speed is not None
    assert (before.chosen.speed.source, after.chosen.speed.source) == ("table", "profile")
    assert "measured on this machine" in " ".join(after.chosen.why)
    rates = cpu_rates(here, "fp32", profile=profile)
    assert rates.sized(64, [(1.0, 128.0)], 256).gemm == pytest.approx(1e12 * found.products["fp32"][64, 128])
    assert cpu_rates(here, "fp32", processes=2, profile=profile).stream == pytest.approx(rates.stream / 2)


def test_an_interrupted_one_goes_on_where_it_was(little: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(name: str) -> None:
        group = calibration.GROUPS[name]
        monkeypatch.setitem(calibration.GROUPS, name, lambda bench: (asked.append(name), group(bench))[1])

    for name in calibration.GROUPS:
        if name != "launches":
            noted(name)

    def stopped(bench: Bench) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(calibration.GROUPS, "launches", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(cpu_only(), little, links=False)
    first = list(asked)
    assert not little.exists()
    profile = calibrate(cpu_only(), little, links=False)
    assert asked == first  # nothing was measured again
    [found] = profile.devices.values()
    assert found.operation_seconds > 0
    assert found.products


def test_other_machines_devices_stay(little: Path) -> None:
    Profile("2026-01-01", {"RTX A5000": measure.profile_of({"stream_gb_s": 650.0})}).save(little)
    profile = calibrate(cpu_only(), little, quick=True, links=False)
    assert profile.devices["RTX A5000"].stream_gb_s == 650.0
    assert len(profile.devices) == 2


def test_two_processes_tell_each_other_things() -> None:
    found = measure_links(2, on_gpu=False, seconds=0.01)
    assert 0.01 < found["ring"] < 200
    assert 1e-6 < found["latency"] < 1
    assert list(found["pairs"]) == ["0-1"]


def test_a_ring_that_was_measured_is_taken() -> None:
    profile = Profile("2026-01-01", links={(0, 1): 20.0}, rings={"cuda-2": 12.0}, latencies={"cuda-2": 1e-4})
    two = parse_gpus("2x RTX A5000")
    found = link_rates(two, 2, profile=profile)
    assert (found.bytes_s, found.latency, found.measured) == (pytest.approx(12e9), 1e-4, True)
    # Of four, only a pair was measured: the slowest pair decides.
    assert link_rates(parse_gpus("4x RTX A5000"), 4, profile=profile).bytes_s == pytest.approx(20e9)


def test_eight_bits_have_their_own_rate_and_peak() -> None:
    products = {"bf16": {(8192, 4096): 700.0}, "fp8": {(8192, 4096): 1400.0}, "int8": {(8192, 4096): 90000.0}}
    profile = Profile(
        "2026-01-01", dict.fromkeys(("H100 SXM", "RTX A5000"), measure.profile_of({"products": products}))
    )
    h100, a5000 = (parse_gpus(name).devices[0] for name in ("H100", "RTX A5000"))
    assert device_rates(h100, "bf16", profile=profile).eight == pytest.approx(1400e12)
    assert device_rates(a5000, "bf16", profile=profile).eight == a5000.int8_tops * 1e12  # never above the sheet


def test_the_command(little: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.run() == 0
    assert "--calibrate" in capsys.readouterr().out
    monkeypatch.setattr("kitaeru.machine.probe.probe", cpu_only)
    assert command.run(calibrate=True, quick=True, alone=True) == 0
    assert "products in fp32" in capsys.readouterr().out
    assert command.run(json_=True) == 0
    assert json.loads(capsys.readouterr().out)["quick"] is True


@pytest.mark.gpu
def test_a_gpu(tmp_path: Path) -> None:
    profile = calibrate(probe(), tmp_path / "profile.json", quick=True, links=False)
    found = next(iter(profile.devices.values()))
    assert found.product_tflops("bf16", 8192, 4096) > found.product_tflops("fp32", 8192, 4096) > 0
    assert found.stream_gb_s > 0.5 * found.eager_gb_s > 0
    assert found.host_copy_gb_s > 0
    assert found.dequantise_gb_s > 0
    assert found.attention_tflops(2048, "fused")[1] > 0
    assert found.clocks["hot_mhz"] > 0
