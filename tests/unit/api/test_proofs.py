"""The six checks: what they find on a sound engine, and that each fails on one that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from kitaeru.api import proofs
from kitaeru.api.proofs import CHECKS, Bench, prove
from kitaeru.engine.loop import Loop
from kitaeru.events import Evaluated, EventLog, RunFinished, RunStarted, Step
from kitaeru.hardware import parse_gpus


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench.made(tmp_path, parse_gpus("none", "32GB"), "cpu")


def test_accumulation_and_clipping(bench: Bench) -> None:
    answer = proofs.accumulation(bench)
    assert answer["passed"], answer
    assert "clipped to 0.0500" in answer["detail"]


def test_accumulation_that_forgets_how_many_micro_batches_there_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bug that others had for years: each micro-batch's own mean, instead of a share of the whole batch's.
    right = Loop._gradients

    def wrong(self: Any, batches: Any, trained: int, *rest: Any) -> Any:
        if len(batches) == 1:
            return right(self, batches, trained, *rest)
        return right(self, batches, int(batches.tokens[0] / sum(batches.tokens) * trained * 1.3), *rest)

    monkeypatch.setattr(Loop, "_gradients", wrong)
    monkeypatch.setattr(proofs, "_CLIP", 100.0)  # clipping would hide the scale
    assert not proofs.accumulation(bench)["passed"]


def test_memory(bench: Bench) -> None:
    answer = proofs.memory(bench)
    assert answer["passed"], answer


def test_recomputation_that_does_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", lambda *_, **__: None)
    answer = proofs.memory(bench)
    assert not answer["passed"]
    assert "saves 0.0 MB" in answer["detail"]


def run(folder: Path, losses: list[float]) -> None:
    log = EventLog(folder / "events.jsonl")
    log(RunStarted(run="r", model="m", method="full", strategy="ddp", device="cpu", max_steps=len(losses)))
    for number, loss in enumerate(losses, 1):
        log(
            Step(step=number, loss=loss, tokens=1, trained_tokens=1, tokens_per_second=1, learning_rate=0, grad_norm=1,
                 peak_bytes=1, epoch=0, seconds=1)
        )  # fmt: skip
        log(Evaluated(step=number, loss=loss, tokens=1, seconds=1))
    log(RunFinished(outcome="finished", step=len(losses), seconds=1))
    log.close()


@pytest.mark.parametrize(
    ("losses", "passed"),
    [([4.0, 3.0, 2.0, 1.0], True), ([4.0, 3.0, 2.0, 1.001], False), ([4.0, 3.0, 2.0], False), ([], False)],
)
def test_other_losses_than_one_process_has(bench: Bench, losses: list[float], passed: bool) -> None:
    run(bench.folder / "one-full-cpu", [4.0, 3.0, 2.0, 1.0])
    run(bench.folder / "group", losses)
    assert proofs._compared(bench, "group", "cpu", 2)["passed"] is passed


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ("2x RTX A5000", "Swallow-13b-hf: "),
        ("none", "Swallow-13b-hf: "),
        ("T4", "tokens/s"),
    ],
)
def test_a_13b_model_is_planned_for_the_machine(tmp_path: Path, gpus: str, said: str) -> None:
    detail = proofs._thirteen(Bench(tmp_path, parse_gpus(gpus, "64GB"), "cpu"))
    assert said in detail
    assert " GB, about" in detail


def test_the_group_is_all_gpus_or_two_processes(tmp_path: Path) -> None:
    assert Bench(tmp_path, parse_gpus("4x RTX 3090"), "cuda").group == ("cuda", 4)
    assert Bench(tmp_path, parse_gpus("RTX 3090"), "cuda").group == ("cpu", 2)
    assert Bench(tmp_path, parse_gpus("8x H100"), "cuda").step_tokens == 2048


BROKEN = """
import os, sys
from pathlib import Path
from kitaeru.api import proofs
def good(bench):
    print("noise of a library")
    return {"passed": True, "detail": "fine"}
def dead(bench):
    os._exit(9)
def bad(bench):
    raise ValueError("no such thing")
def stuck(bench):
    import time; time.sleep(60)
proofs.CHECKS = tuple((name, globals()[name]) for name in ("good", "dead", "bad", "stuck"))
proofs._CHECK_SECONDS = 1.0
proofs.main(Path(sys.argv[1]), [1, 2, 3, 4])
"""


def test_a_check_that_dies_leaves_the_others(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN, str(tmp_path)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(f["number"], f["passed"]) for f in found] == [(1, True), (2, False), (3, False), (4, False)]
    assert [f["detail"] for f in found] == ["fine", "exit code 9", "ValueError: no such thing", "it does not end"]


def test_checks_that_do_not_start_have_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: libtorch.so' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    found = list(prove())
    assert [proof.number for proof in found] == list(range(1, len(CHECKS) + 1))
    assert {(proof.passed, proof.detail) for proof in found} == {(False, "ImportError: libtorch.so")}
