"""benchmarks/against.py: its roofline, the search for a micro-batch, and a whole run on the CPU."""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import against
import pytest
import torch

from kitaeru.hardware import parse_gpus
from kitaeru.shape import ModelShape


def job(**changes: Any) -> Any:
    plain = against.Job("peft", {}, "lora", 16, 128, 0, "cpu", "", "", "", 1, 1)
    return replace(plain, **changes)


def test_roofline_of_an_8b_shape_on_an_h100() -> None:
    h100 = parse_gpus("H100 SXM").devices[0]
    shape = ModelShape.from_config(against.config_of(against.POINTS["8b-qlora-24"]))
    # By hand: 6.98e9 weights in the blocks, 128,256 x 4,096 in the head, 3.5 x 2 x 32 x 2,048 x 4,096 of attention.
    flop, rest = 4 * 6_979_321_856, 4 * 525_336_576 + 1_879_048_192
    wide = against.roofline(shape, "qlora", 2048, h100.bf16_tflops, h100.bf16_tflops)
    assert wide == pytest.approx(1e12 * h100.bf16_tflops / (flop + rest))
    assert wide == pytest.approx(31_000, rel=0.01)
    narrow = against.roofline(shape, "qlora", 2048, h100.fp8_tflops, h100.bf16_tflops)
    assert narrow == pytest.approx(1e12 / (flop / h100.fp8_tflops + rest / h100.bf16_tflops))
    assert against.roofline(shape, "qlora", 2048, 0.0, 0.0) == 0.0


def test_every_point_has_full_rows_and_a_shape() -> None:
    for name, point in against.POINTS.items():
        assert point.step_tokens % point.seq_len == 0, name
        shape = ModelShape.from_config(against.config_of(point))
        assert shape.max_position >= point.seq_len
    assert ModelShape.from_config(against.config_of(against.POINTS["mixtral-qlora"])).layers == 4


def test_the_fastest_micro_batch_that_fits() -> None:
    seconds, tried = {4: 0.2, 2: 0.02, 1: 0.05}, []  # fivefold, where sleeps may last longer

    def passes(rows: int) -> None:
        tried.append(rows)
        if rows not in seconds:
            raise torch.OutOfMemoryError
        time.sleep(seconds[rows])

    assert against.fastest(passes, job(), lambda: None) == 2
    assert tried == [8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    seconds.clear()
    with pytest.raises(torch.OutOfMemoryError):
        against.fastest(passes, job(), lambda: None)


def test_a_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "against.csv"

    def run(*words: str) -> str:
        plain = ["--out", str(out), "--device", "cpu", "--work", str(tmp_path / "work"), "--warm", "1", "--timed", "1"]
        monkeypatch.setattr(sys, "argv", ["against.py", *plain, *words])
        against.main()
        return capsys.readouterr().out

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run("--points", "1b-lora-24", "--contenders", "unsloth", "peft", "kitaeru")
    assert "tokens/s" not in run("--points", "1b-lora-24", "--contenders", "peft", "kitaeru")  # nothing is missing
    with out.open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["unsloth", "peft", "kitaeru"]
    assert rows["unsloth"]["error"] == "needs a GPU"
    for who in ("peft", "kitaeru"):
        row = rows[who]
        assert not row["error"], row["error"]
        assert float(row["tokens_per_second"]) > 0
        assert row["step_tokens"] == "512"
        assert 512 % int(row["micro_tokens"]) == 0
        assert 9 < float(row["loss"]) < 11  # ln 24,576 is 10.1
    assert rows["peft"]["trained_parameters"] == rows["kitaeru"]["trained_parameters"]
    late = run("--points", "8b-lora", "--contenders", "peft", "--point-seconds", "0.1")
    assert "failed: no end within 0 s" in late
