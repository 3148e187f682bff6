"""Proves the sbatch script of `kitaeru launch --on slurm` on a real Slurm: two nodes on this host, as root.

Needs Debian's slurm-wlm and munge. A cluster of its own (munged, slurmctld, two slurmd) is made in a temporary folder
and taken down at the end. Three jobs: the script as written; the same with one rank killed, which the hosts get over by
themselves; the same with one host's program killed, which ends the step and puts the job back in the queue, where it
goes on from its checkpoint. What it prints is kept in docs/slurm-proof.txt:

    python scripts/prove_slurm.py > docs/slurm-proof.txt
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kitaeru
from kitaeru.events import RunFinished, RunStarted, Step, read

STEPS = 150
RECIPE = {
    "model": "bundled",
    "data": {"train": "train.jsonl", "seq_len": 64, "workers": 1, "max_examples": 64},
    "method": "lora",
    "strategy": "ddp",
    "lora": {"r": 4},
    "train": {"max_steps": STEPS, "global_batch_tokens": 192, "save_every": 5, "learning_rate": 1e-3},
    "limits": {"micro_batch_tokens": 64, "threads": 1, "device": "cpu", "max_restarts": 1},
    "track": {"tensorboard": False},
    "samples": {"count": 0},
}
CONFIG = """\
ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge/socket
CredType=cred/munge
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=3
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} RealMemory={memory} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def say(text: str) -> None:
    print(text, flush=True)


def shell(*words: str, quiet: bool = False, **options: object) -> str:
    """Run and show a command; what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    if not quiet:
        say(f"$ {' '.join(Path(words[0]).name if i == 0 else word for i, word in enumerate(words))}\n{done.stdout}")
    if done.returncode:
        raise SystemExit(f"{words[0]}: exit {done.returncode}: {done.stderr}")
    return str(done.stdout)


@contextmanager
def cluster(at: Path) -> Iterator[None]:
    """A Slurm of two nodes on this host."""
    for name in ("munge", "state"):
        (at / name).mkdir()
    at.chmod(0o755)
    key = at / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    ports = [free_port() for _ in range(3)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 3 // 4
    facts = {"host": socket.gethostname().partition(".")[0], "at": at, "cpus": os.cpu_count(), "memory": memory}
    config = at / "slurm.conf"
    config.write_text(CONFIG.format(port=ports[0], first=ports[1], second=ports[2], **facts))
    os.environ["SLURM_CONF"] = str(config)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    shell("munged", "--force", *(f"--{name}={at}/munge/{file}" for name, file in munge.items()), quiet=True)
    try:
        shell("slurmctld", "-f", str(config), quiet=True)
        for node in ("n1", "n2"):
            shell("slurmd", "-f", str(config), "-N", node, quiet=True)
        until("both nodes are idle", lambda: shell("sinfo", "-h", "-o", "%D %t", quiet=True).strip() == "2 idle", 30)
        yield
    finally:
        subprocess.run(
            ["scancel", "--user=root"], capture_output=True
        )  # of this cluster; there are none if all went well
        time.sleep(2)
        for file in (at / "slurmd-n1.pid", at / "slurmd-n2.pid", at / "slurmctld.pid", at / "munge" / "pid"):
            if file.exists():
                stop(int(file.read_text()))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def stop(process: int) -> None:
    os.kill(process, signal.SIGTERM)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)


def until(what: str, true, seconds: float = 240) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


class Job:
    """A job with a run of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.run, self.work = work / name, work
        words = ["--on", "slurm", "recipe.yaml", "--nodes", "2", "--set", f"output={name}", "-o", f"{name}.sbatch"]
        shell("kitaeru", "launch", *words, cwd=work)
        shell("bash", "-n", f"{name}.sbatch", cwd=work, quiet=True)
        said = shell("sbatch", f"{name}.sbatch", cwd=work)
        self.number = said.split()[-1]
        self.pending = 0
        self.log = work / f"{name}-{self.number}.log"

    def steps(self) -> list[int]:
        path = self.run / "events.jsonl"
        return [event.step for event in read(path) if isinstance(event, Step)] if path.exists() else []

    def state(self) -> str:
        return shell("scontrol", "-o", "show", "job", self.number, quiet=True).split("JobState=")[1].split()[0]

    def _has_ended(self) -> bool:
        state = self.state()
        # Put back: Slurm lets two minutes go by unless told otherwise, and must be done with the killing before.
        self.pending = self.pending + 1 if state == "PENDING" and self.steps() else 0
        if self.pending > 75:
            subprocess.run(["scontrol", "update", f"JobId={self.number}", "StartTime=now"], capture_output=True)
        return state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

    def ended(self, *, resumed: int, restarts: str) -> None:
        """Wait for the end, and look whether it is the run it should be."""
        until("the job has ended", self._has_ended, 400)
        shown = shell("scontrol", "-o", "show", "job", self.number, quiet=True)
        facts = {
            name: shown.split(f"{name}=")[1].split()[0] for name in ("JobState", "Restarts", "ExitCode", "NodeList")
        }
        say(" ".join(f"{name}={value}" for name, value in facts.items()))
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), self.log.read_text()
        assert self.steps() == list(range(1, STEPS + 1))
        events = list(read(self.run / "events.jsonl"))
        starts = [event.resumed_step for event in events if isinstance(event, RunStarted)]
        assert len(starts) == resumed + 1
        assert all(10 <= step < STEPS for step in starts[1:]), starts
        assert [e.outcome for e in events if isinstance(e, RunFinished)][-1] == "finished"
        told = re.compile(r"is lost|going on after|Started again|^finished|^run folder|kitaeru ·|^Waiting|[Rr]equeue")
        say("".join(line + "\n" for line in self.log.read_text().splitlines() if told.search(line)))


def rank(job: Job, number: int) -> int:
    return int(json.loads((job.run / "logs" / f"rank-{number}.json").read_text())["pid"])


def program_of(process: int) -> int:
    """The `kitaeru` that a rank descends from."""
    while "kitaeru" not in Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").partition(" -c ")[0]:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


def main() -> None:
    """Three jobs."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(f"needs root, slurm-wlm and munge (not here: {', '.join(missing)})")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LC_ALL": "C.UTF-8", "COLUMNS": "120"}  # n1 and n2 are no real names
    with tempfile.TemporaryDirectory(prefix="kitaeru-slurm-") as folder:
        at, work = Path(folder), Path(folder) / "work"
        work.mkdir()
        shutil.copy(Path(kitaeru.__file__).parent / "assets" / "quickstart" / "train.jsonl", work)
        (work / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
        with cluster(at):
            shell("sinfo", "--version")
            shell("sinfo")
            say("# --- the script as written")
            job = Job(work, "whole")
            say(f"$ cat whole.sbatch\n{(work / 'whole.sbatch').read_text()}")
            job.ended(resumed=0, restarts="0")
            say("# --- rank 1 is killed: the hosts start again together")
            job = Job(work, "rank")
            until("twelve steps", lambda: len(job.steps()) >= 12)
            os.kill(rank(job, 1), signal.SIGKILL)
            job.ended(resumed=1, restarts="0")
            say("# --- the program of the second host is killed: Slurm begins the job again")
            job = Job(work, "host")
            until("twelve steps", lambda: len(job.steps()) >= 12)
            os.kill(program_of(rank(job, 1)), signal.SIGKILL)
            job.ended(resumed=1, restarts="1")
    say("all as it should be")


if __name__ == "__main__":
    main()
