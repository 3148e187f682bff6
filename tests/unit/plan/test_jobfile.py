"""Job files: what a shell and a YAML reader make of them, against the fields that the schedulers document."""

from __future__ import annotations

import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kitaeru.cli import main

RECIPE = """\
model: elyza/Llama-3-ELYZA-JP-8B
data: {train: my.jsonl}
limits: {max_restarts: 2}
output: runs/8B_first
"""
PAIR = ("--nodes", "2", "--gpus", "2x RTX A5000", "--ram", "128GB")


@pytest.fixture
def written(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`written("slurm", …)`: the text of a job file."""
    (in_tmp / "recipe.yaml").write_text(RECIPE)
    (in_tmp / "my.jsonl").write_text('{"text": "鍛える"}\n')

    def write(kind: str, *words: str, code: int = 0) -> str:
        assert main(["launch", "recipe.yaml", "--on", kind, *PAIR, *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return write


def command_of(text: str) -> list[str]:
    [line] = [line for line in text.splitlines() if "kitaeru train" in line]
    return shlex.split(line)


def settings_of(words: list[str]) -> dict[str, str]:
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return dict(pair.split("=", 1) for pair in pairs)


def test_slurm(written: Any, in_tmp: Path) -> None:
    text = written("slurm", "--partition", "gpu", "--time", "12:00:00")
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=30)
    assert checked.returncode == 0, checked.stderr
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH")
    )
    assert (options["nodes"], options["ntasks-per-node"], options["gres"]) == ("2", "1", "gpu:2")
    assert (options["partition"], options["time"]) == ("gpu", "12:00:00")
    assert 8_000 < int(options["mem"].removesuffix("M")) <= 128_000_000_000 // 2**20
    words = command_of(text)
    assert words[0] == "srun"
    assert words[words.index("--output") + 1] == "runs/8B_first"
    assert "--resume" in words
    assert settings_of(words) == {"strategy": "ddp", "method": "lora", "limits.devices": "4"}
    assert "-lt 2 ]" in text  # max_restarts
    assert "tokens/s" in text.splitlines()[1]


def test_the_words_of_the_script_are_a_command_line(written: Any) -> None:
    """What the job runs is planned anew with these words, and is the same plan."""
    words = command_of(written("slurm", "--set", "data.seq_len=1024"))
    from kitaeru.recipe.read import read

    overrides = [word for before, word in pairwise(words) if before == "--set"]
    recipe = read(Path("recipe.yaml"), overrides=overrides).recipe
    assert (recipe.strategy, recipe.method, recipe.limits.devices, recipe.data.seq_len) == ("ddp", "lora", 4, 1024)


def test_kubernetes(written: Any) -> None:
    job = YAML(typ="safe").load(written("kubernetes", "--image", "registry/kitaeru:1", "--volume", "shared"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"name": "run-8b-first"}
    spec = job["spec"]
    assert set(spec) == {"runtimeRef", "trainer", "runtimePatches"}
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    trainer = spec["trainer"]
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
    assert (trainer["numNodes"], trainer["image"]) == (2, "registry/kitaeru:1")
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "2"
    assert trainer["resourcesPerNode"]["limits"] == trainer["resourcesPerNode"]["requests"]
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in trainer["env"]
    environment = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a-0.a", "PET_MASTER_PORT": "29500"}
    said = subprocess.run(
        [*trainer["command"][:2], trainer["command"][2].replace("cd /work && exec kitaeru", "printf '%s\\n'")],
        env=environment, capture_output=True, text=True, timeout=30, check=True,
    ).stdout.split("\n")  # fmt: skip
    at = said.index("--nodes")
    assert said[at : at + 6] == ["--nodes", "2", "--node-rank", "1", "--master", "a-0.a:29500"]
    [patch] = spec["runtimePatches"]
    pod = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {volume["name"] for volume in pod["volumes"]} == {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert {"name": "work", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_skypilot(written: Any) -> None:
    task = YAML(typ="safe").load(written("skypilot"))
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["num_nodes"] == 2
    resources = task["resources"]
    assert set(resources) <= {"accelerators", "cpus", "memory", "network_tier", "job_recovery"}
    assert resources["accelerators"] == "RTXA5000:2"
    assert resources["job_recovery"] == {"max_restarts_on_errors": 2}
    script = task["run"].replace("kitaeru train", "printf '%s\\n' train")
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    said = subprocess.run(
        ["bash", "-c", script], env=environment | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    ).stdout
    assert "--nodes\n2\n--node-rank\n0\n--master\n10.0.0.7:29500\n" in said


def test_a_scheduler_nobody_knows(written: Any) -> None:
    assert "slurm, kubernetes, skypilot" in " ".join(written("pbs", code=2).split())


def test_one_host_and_a_file(written: Any, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "recipe.yaml", "--on", "slurm", "--gpus", "1x RTX A5000", "-o", "job.sbatch"]
    assert main(words) == 0
    assert "job.sbatch" in capsys.readouterr().out
    text = (in_tmp / "job.sbatch").read_text()
    assert "#SBATCH --nodes=1\n" in text
    assert "#SBATCH --gres=gpu:1\n" in text
    assert settings_of(command_of(text))["limits.devices"] == "1"


def test_a_recipe_for_one_device_on_several_hosts(written: Any) -> None:
    assert "Leave `strategy` out." in written("slurm", "--set", "strategy=single", code=1)
