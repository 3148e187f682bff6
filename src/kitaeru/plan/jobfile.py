"""A plan as a job of a scheduler: an sbatch script, a Kubeflow TrainJob, a SkyPilot task.

All three start the same thing: `kitaeru train` once on each host, which starts the processes of its devices itself,
with `--resume`, so that a job that is begun again goes on. Fields are those of Slurm 22.05 and later, of
trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer 2.2) and of SkyPilot's task YAML (0.8 and later).
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from kitaeru.errors import UsageError
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan

GB = 10**9
PORT = 29500
# Time between the scheduler's SIGTERM and its limit: a step, and a checkpoint.
SAVE_SECONDS = 180
# What a process needs beside what the plan counts: the interpreter, libraries, the page cache of a file.
HOST_SPARE_BYTES = 8 * GB
# NCCL says why in the log when it fails; which network leads to the other hosts kitaeru tells it itself. One thread of
# arithmetic a process: the tokeniser and the loader have processes of their own.
ENVIRONMENT = MappingProxyType({"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


@dataclass(frozen=True)
class Job:
    """A plan with what a scheduler must know besides. `gpus` and `cpus` are those of one host."""

    plan: Plan
    recipe: str
    name: str
    nodes: int
    gpus: int
    gpu_name: str
    cpus: int
    host_bytes: int
    restarts: int
    arguments: tuple[str, ...]
    time_limit: str = "24:00:00"
    partition: str | None = None
    image: str = "kitaeru:cuda"
    volume: str = "kitaeru-work"

    @property
    def words(self) -> list[str]:
        """The command of every host, without what tells hosts apart."""
        return ["kitaeru", "train", self.recipe, "--plain", "--resume", *self.arguments]

    @property
    def told(self) -> tuple[str, str]:
        """What is planned, in two lines."""
        chosen, layout = self.plan.chosen, self.plan.layout
        speed = chosen.speed
        rate = f"{speed.tokens_per_second:,.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f})" if speed else "?"
        what = f"{layout.name} on {layout.devices} devices of {self.nodes} hosts"
        return what, f"{chosen.peak_bytes / GB:.1f} GB of each device at the peak, about {rate}"


def job_of(plan: Plan, recipe: Path, hardware: Hardware, own: tuple[str, ...] = (), **more: Any) -> Job:
    """The job that carries out `plan`, made for `hardware` (all hosts together); `own` are words of the user's.

    The strategy, the method and the run's folder are pinned: what was planned here is what runs there.
    """
    layout, wish = plan.layout, plan.recipe
    nodes = hardware.hosts
    devices = layout.devices if nodes == 1 else len(hardware.devices) or layout.devices
    gpus = -(-devices // nodes) if layout.device == "cuda" else 0
    name = _name(Path(wish.output).name if wish.output else recipe.stem)
    output = wish.output or f"runs/{name}"
    settings = {"strategy": layout.strategy, "method": layout.method, "limits.devices": layout.devices}
    pins = tuple(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))
    cores = max(1, hardware.cpu_cores // nodes)
    host_bytes = min(plan.chosen.host_bytes // nodes + HOST_SPARE_BYTES, hardware.host_ram_bytes // nodes)
    return Job(
        plan, str(recipe), name, nodes, gpus, hardware.devices[0].name if hardware.devices else "", cores, host_bytes,
        wish.limits.max_restarts, ("--output", output, *own, *pins), **more,
    )  # fmt: skip


def _name(text: str) -> str:
    """A name that every scheduler takes (RFC 1035).

    >>> _name("8B_qlora v2"), _name("日本語")
    ('run-8b-qlora-v2', 'run')
    """
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (found if re.match("[a-z]", found) else f"run-{found}".strip("-"))[:50].strip("-")


def write_job(kind: str, job: Job) -> str:
    """The text of a job file for `slurm`, `kubernetes` or `skypilot`.

    Raises:
        UsageError: another scheduler.
    """
    if kind not in WRITERS:
        raise UsageError(
            tr("kitaeru writes no jobs for `{kind}`.", kind=kind),
            remedy=tr("Known: {names}.", names=", ".join(WRITERS)),
        )
    return WRITERS[kind](job)


def slurm(job: Job) -> str:
    """An sbatch script. A job that ends badly, or meets its time limit, is put back in the queue and goes on."""
    asked = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus}",
        f"--mem={-(-job.host_bytes // 2**20)}M",
        f"--time={job.time_limit}",
        f"--signal=TERM@{SAVE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    if job.gpus:
        asked.insert(3, f"--gres=gpu:{job.gpus}")
    if job.partition:
        asked.insert(1, f"--partition={job.partition}")
    what, costs = job.told
    lines = [
        "#!/bin/bash",
        f"# {what}: {costs}.",
        "# Hand it in with: sbatch FILE. The recipe, its data and the run's folder must be seen from every host.",
        *(f"#SBATCH {option}" for option in asked),
        "",
        "set -uo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        *(f"export {name}={value}" for name, value in ENVIRONMENT.items()),
        "ulimit -l unlimited 2>/dev/null || true  # InfiniBand pins memory",
        "",
        "# One task a host: kitaeru starts the processes of its GPUs itself; Slurm's words tell it of the others.",
        f"srun --kill-on-bad-exit=1 {shlex.join(job.words)}",
        "code=$?",
        f'if [ "$code" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def kubernetes(job: Job) -> str:
    """A TrainJob on the runtime `torch-distributed`, whose variables say which host is which."""
    hosts = ["--nodes", "$PET_NNODES", "--node-rank", "$PET_NODE_RANK", "--master", "$PET_MASTER_ADDR:$PET_MASTER_PORT"]
    script = f"exec {shlex.join(job.words)} {' '.join(_quoted(word) for word in hosts)}"
    amounts = {"cpu": str(job.cpus), "memory": f"{-(-job.host_bytes // 2**20)}Mi"}
    if job.gpus:
        amounts["nvidia.com/gpu"] = str(job.gpus)
    pod = {
        # Processes of one host meet in shared memory, of which a container has 64 MB by default.
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "work", "persistentVolumeClaim": {"claimName": job.volume}},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "work", "mountPath": "/work"}],
            }
        ],
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return _yaml(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name},
            "spec": {
                "runtimeRef": {"name": "torch-distributed"},
                "trainer": {
                    "image": job.image,
                    "command": ["bash", "-c", f"cd /work && {script}"],
                    "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
                    "numNodes": job.nodes,
                    "resourcesPerNode": {"requests": amounts, "limits": dict(amounts)},
                },
                "runtimePatches": [
                    {
                        "manager": "kitaeru.dev/launch",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                    }
                ],
            },
        },
        *job.told,
        "Hand it in with: kubectl apply -f FILE. Kubeflow Trainer 2.2 or later must be there, and a volume claim",
        f"`{job.volume}` that every host may write to, with the recipe and its data: it is /work in the containers.",
    )


def skypilot(job: Job) -> str:
    """A task for `sky launch`, or for `sky jobs launch`, which starts it again when it is lost."""
    hosts = ["--nodes", "$SKYPILOT_NUM_NODES", "--node-rank", "$SKYPILOT_NODE_RANK", "--master", f"$first:{PORT}"]
    run = [
        'first=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
        f"{shlex.join(job.words)} {' '.join(_quoted(word) for word in hosts)}",
    ]
    resources: dict[str, Any] = {"cpus": f"{job.cpus}+", "memory": f"{-(-job.host_bytes // GB)}+"}
    if job.gpus:
        resources["accelerators"] = f"{accelerator(job.gpu_name)}:{job.gpus}"
    if job.nodes > 1:
        resources["network_tier"] = "best"
    resources["job_recovery"] = {"max_restarts_on_errors": job.restarts}
    return _yaml(
        {
            "name": job.name,
            "workdir": ".",
            "num_nodes": job.nodes,
            "resources": resources,
            "envs": dict(ENVIRONMENT),
            "setup": LiteralScalarString("pip install kitaeru\n"),
            "run": LiteralScalarString("\n".join(run) + "\n"),
        },
        *job.told,
        "Hand it in with: sky launch FILE. What lies beside the recipe is copied to every host; to go on after a host",
        "was lost, let the run's folder lie on a bucket (file_mounts) and use: sky jobs launch FILE.",
    )


def accelerator(name: str) -> str:
    """A card as SkyPilot calls it.

    >>> accelerator("NVIDIA RTX A5000"), accelerator("H100 SXM"), accelerator("A100 80GB"), accelerator("RTX 4090")
    ('RTXA5000', 'H100', 'A100-80GB', 'RTX4090')
    """
    words = [word for word in re.split(r"[\s-]+", name) if word.lower() not in ("nvidia", "geforce", "sxm", "pcie")]
    sizes = [word for word in words if re.fullmatch(r"\d+GB", word)]
    return "-".join(["".join(word for word in words if word not in sizes), *sizes])


def _quoted(word: str) -> str:
    """A word in which the shell fills in variables and does not split."""
    return f'"{word}"' if "$" in word else word


def _yaml(value: Mapping[str, Any], *comments: str) -> str:
    yaml = YAML()
    yaml.width = 10**6
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(dict(value), out)
    return "".join(f"# {line}\n" for line in comments) + out.getvalue()


WRITERS: dict[str, Callable[[Job], str]] = {"slurm": slurm, "kubernetes": kubernetes, "skypilot": skypilot}
