"""Runs of the real command line, in processes that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kitaeru.events import Event, read


class Started:
    """A `kitaeru` in a process of its own."""

    def __init__(self, starter: Starter, pid: int, output: Path) -> None:
        self.starter, self.pid, self.output = starter, pid, output

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return self.starter.ask({"wait": self.pid})

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def assert_nobody_left(self) -> None:
        """Every process of its session has gone: no rank, no zombie, nothing that holds a port."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            left = []
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = stat.read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.pid:
                    left.append(stat.parent.name)
            if not left:
                return
            time.sleep(0.1)
        raise AssertionError(f"still there: {left}")


class Starter:
    """The process of starter.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("starter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def start(self, *argv: str | Path, cwd: Path, **how: Any) -> Started:
        """`how`: see starter.py."""
        output = cwd / "said.txt"
        output.unlink(missing_ok=True)
        request = {"argv": [str(word) for word in argv], "cwd": str(cwd), "output": str(output), **how}
        return Started(self, self.ask(request), output)


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """`starter.start("train", "recipe.yaml", cwd=folder)`."""
    made = Starter()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)


class Folder:
    """A working folder with a recipe; its run is in `run`."""

    def __init__(self, path: Path, starter: Starter, training: Any, recipe: dict[str, Any]) -> None:
        self.path, self.starter, self.training, self.recipe = path, starter, training, recipe
        path.mkdir(parents=True, exist_ok=True)
        training.write_data(path / "train.jsonl")
        training.write_data(path / "valid.jsonl", 6, start=100)
        self.write()

    def write(self, **changes: Any) -> None:
        for path, value in changes.items():
            self.training.put(self.recipe, path.replace("__", "."), value)
        (self.path / "recipe.yaml").write_text(json.dumps(self.recipe))  # JSON is YAML

    def start(self, *more: str, **how: Any) -> Started:
        return self.starter.start("train", "recipe.yaml", "--plain", *more, cwd=self.path, **how)

    def train(self, *more: str, code: int = 0, **how: Any) -> str:
        started = self.start(*more, **how)
        ended = started.wait()
        assert ended == code, started.said
        return started.said

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def log(self) -> Path:
        return self.run / "events.jsonl"

    def events(self, kind: type[Event]) -> list[Any]:
        return [event for event in read(self.log) if isinstance(event, kind)]

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.run / "checkpoints").glob("step-*"))

    def wait_for(self, kind: str, started: Started, *, count: int = 1, seconds: float = 300) -> None:
        """Until the log holds `count` events of `kind`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.log.exists() and self.log.read_bytes().count(b'"kind": "%s"' % kind.encode()) >= count:
                return
            time.sleep(0.005)
        raise AssertionError(f"no {kind} in {seconds} s: {started.said}")

    def lines(self, kind: str) -> int:
        return self.log.read_bytes().count(b'"kind": "%s"' % kind.encode()) if self.log.exists() else 0

    def adapter(self) -> bytes:
        return (self.run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def new_folder(starter: Starter, training: Any, tiny_model: Path):
    """`new_folder(path, train__seed=3)`: a folder with a recipe in which much could go wrong."""

    def make(path: Path, **changes: Any) -> Folder:
        recipe: dict[str, Any] = {
            "model": str(tiny_model),
            "data": {"train": "train.jsonl", "valid": "valid.jsonl", "seq_len": 64, "workers": 1},
            "method": "lora",
            "lora": {"r": 4, "dropout": 0.1},
            "train": {
                "max_steps": 24,
                "learning_rate": 5e-3,
                "global_batch_tokens": 192,
                "eval_every": 4,
                "save_every": 3,
                "neftune_alpha": 5.0,
            },
            "limits": {"micro_batch_tokens": 64, "threads": 1, "device": "cpu"},
            "track": {"tensorboard": False},
            "samples": {"count": 1, "max_new_tokens": 2},
            "output": "run",
        }
        folder = Folder(path, starter, training, recipe)
        folder.write(**changes)
        return folder

    return make
