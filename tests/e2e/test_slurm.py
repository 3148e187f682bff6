"""The sbatch script on a real Slurm, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prove_slurm.py"


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(name) is None for name in ("slurmctld", "slurmd", "munged", "sbatch")),
    reason="needs root, and Debian's slurm-wlm and munge",
)
def test_the_job_runs_and_is_put_back_when_a_host_dies() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all as it should be")
