"""Attempts in processes of their own: what ends, fails, dies or hangs. Real forks, real sums over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kitaeru.machine.trials import run_trials

FORKS = """
import json, os, sys, time
from pathlib import Path
from functools import partial
from kitaeru.machine.attempt import attempt
patient = partial(attempt, seconds=200.0)
def good(rank, ranks, store, word):
    return {"rank": rank, "word": word, "variable": os.environ.get("NCCL_TEST", "")}
def bad(rank, ranks, store):
    if rank == 1:
        raise RuntimeError("no room\\nand a trace")
    time.sleep(600)
def dead(rank, ranks, store):
    os._exit(7)
def stuck(rank, ranks, store):
    time.sleep(600)
folder = Path(sys.argv[1])
answers = [
    patient(folder, 2, {"NCCL_TEST": "x"}, good, "hi"),
    patient(folder, 2, {}, bad),
    patient(folder, 1, {}, dead),
    attempt(folder, 1, {}, stuck, seconds=1.0),
    os.environ.get("NCCL_TEST", ""),
]
print(json.dumps(answers))
"""


def test_an_attempt_ends_whatever_it_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    good, bad, dead, stuck, variable = json.loads(done.stdout)
    assert good == [{"rank": rank, "word": "hi", "variable": "x"} for rank in (0, 1)]
    assert variable == ""
    assert bad == ["hung", "RuntimeError: no room"]
    assert dead == ["exit code 7"]
    assert stuck == ["hung"]


def test_a_sum_over_gloo_is_right_and_timed() -> None:
    trials = run_trials()
    assert trials.error == ""
    assert trials.torch.version
    tried = trials.sums[-1]
    assert (tried.transport, tried.backend, tried.ranks, tried.good) == ("cpu", "gloo", 2, True)
    assert 0 < tried.gb_s < 1000
    assert trials.environment == {} or trials.torch.devices > 1


def test_what_does_not_work_says_why() -> None:
    trials = run_trials({**os.environ, "GLOO_SOCKET_IFNAME": "nowhere0", "CUDA_VISIBLE_DEVICES": ""})
    [tried] = trials.sums
    assert not tried.good
    assert "nowhere0" in tried.error


def test_torch_that_does_not_load_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text('raise ImportError("libcudart.so.13: cannot open")')
    trials = run_trials({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert trials.error == "ImportError: libcudart.so.13: cannot open"
