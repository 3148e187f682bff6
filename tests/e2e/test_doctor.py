"""`kitaeru doctor` as a person runs it, also where a machine is really short of something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kitaeru.hardware import Hardware

KITAERU = [sys.executable, "-m", "kitaeru"]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(words),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        timeout=200,
    )


def levels(examined: dict[str, Any]) -> dict[str, str]:
    return {finding["ailment"]: finding["level"] for finding in examined["findings"]}


def test_the_answer_for_programs_is_a_machine_s_description_too(in_tmp: Path) -> None:
    done = run(*KITAERU, "doctor", "--json", cwd=in_tmp)
    examined = json.loads(done.stdout)
    assert done.returncode == (0 if examined["healthy"] else 1)
    assert examined["trials"]["sums"]
    assert all(one["what"] and one["why"] for one in examined["not_looked_at"])
    (in_tmp / "machine.json").write_text(done.stdout)
    assert Hardware.load(in_tmp / "machine.json").host_ram_bytes > 0
    planned = run(*KITAERU, "plan", "bundled", "--gpus", "machine.json", cwd=in_tmp)
    assert planned.returncode == 0, planned.stderr


def test_a_sum_that_fails_makes_the_machine_ill(in_tmp: Path) -> None:
    done = run(*KITAERU, "doctor", cwd=in_tmp, GLOO_SOCKET_IFNAME="nowhere0", COLUMNS="80")
    assert done.returncode == 1
    assert "nowhere0" in done.stdout
    assert "→ export GLOO_SOCKET_IFNAME=lo" in done.stdout
    assert "training would fail here" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "→" not in line) <= 80


def namespace() -> list[str]:
    """A command that starts another in mount namespaces of its own; the test is skipped where that is not allowed."""
    for words in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        ):
            return words
    pytest.skip("unshare --mount is not permitted here")


def test_a_machine_short_of_shared_memory_locked_memory_files_and_disk(in_tmp: Path) -> None:
    if not shutil.which("prlimit"):
        pytest.skip("prlimit is not installed")
    script = (
        "mount -t tmpfs -o size=32m tmpfs /dev/shm && export KITAERU_CACHE=/dev/shm/cache && "
        'exec prlimit --memlock=65536:65536 --nofile=512:512 "$@"'
    )
    done = run(*namespace(), "sh", "-c", script, "sh", *KITAERU, "doctor", "--json", cwd=in_tmp)
    assert done.returncode == 1, done.stderr
    examined = json.loads(done.stdout)
    found = levels(examined)
    assert found["disk-low"] == "failure"
    assert found["nofile-low"] == "warning"
    assert found["memlock-low"] in ("note", "warning")
    assert found["shm-small"] in ("failure", "warning")
    told = " ".join(finding["what"] + finding["mend"] for finding in examined["findings"])
    assert "/dev/shm has only 34 MB." in told
    assert "512 files" in told
    assert examined["facts"]["limits"]["memlock_bytes"] == 65536


def test_training_under_accelerate_is_checked(in_tmp: Path) -> None:
    done = run(*KITAERU, "doctor", "--train", "--only", "2", "--json", cwd=in_tmp)
    [check] = json.loads(done.stdout)["checks"]
    assert (check["number"], check["passed"]) == (2, True), check
    assert "losses as of one" in check["detail"]


def test_a_check_that_does_not_exist(in_tmp: Path) -> None:
    done = run(*KITAERU, "doctor", "--train", "--only", "7", cwd=in_tmp)
    assert done.returncode == 2
    assert "from 1 to 6" in done.stderr


def test_a_quick_look_tries_nothing(in_tmp: Path) -> None:
    done = run(*KITAERU, "doctor", "--quick", "--json", cwd=in_tmp, GLOO_SOCKET_IFNAME="nowhere0")
    examined = json.loads(done.stdout)
    assert examined["trials"]["sums"] == []
    assert "--quick" in json.dumps(examined["not_looked_at"])
    assert examined["facts"]["host_bytes"] > 0
