"""The examples: each fits the machine it is for, and each runs, at a small scale, with two processes where it has two
cards; one of them under every launcher.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kitaeru.cli import main
from kitaeru.events import RunFinished, RunStarted, Step, read
from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import make_plan
from kitaeru.plan.types import Plan
from kitaeru.recipe.read import read as read_recipe
from kitaeru.shape import find_shape

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# name, the catalogue's model of the same sizes, strategy, method
CASES = [
    ("ddp-7b", "llm-jp/llm-jp-3-7.2b", "ddp", "lora"),
    ("model-parallel-13b", "llm-jp/llm-jp-3-13b", "model_parallel", "lora"),
    ("qlora-22b", "cyberagent/calm3-22b-chat", "model_parallel", "qlora"),
    ("offload-70b", "tokyotech-llm/Llama-3.1-Swallow-70B-v0.1", "single", "qlora"),
]
NAMES = [case[0] for case in CASES]


@pytest.mark.parametrize(("name", "model", "strategy", "method"), CASES, ids=NAMES)
def test_it_fits_two_cards_of_24_gb(name: str, model: str, strategy: str, method: str) -> None:
    recipe = read_recipe(EXAMPLES / f"{name}.yaml").recipe
    cards = "1x RTX A5000" if "offload" in name else "2x RTX A5000"  # on two cards a 70B needs no disk: it is split
    plan = make_plan(recipe, parse_gpus(cards, "128GB"), find_shape(model))
    assert (plan.layout.strategy, plan.layout.method) == (strategy, method)
    assert plan.recipe.train.global_batch_examples == 64
    assert plan.layout.variant == ("disk" if "offload" in name else "")
    if recipe.limits.memory_gb:
        assert max(plan.chosen.device_peaks) < 22 * 10**9


@pytest.fixture
def overrides(tiny_model: Path, chat_data: Path, in_tmp: Path) -> list[str]:
    """What makes a second of an hour."""
    values = {
        "data.seq_len": 64, "data.workers": 1, "data.valid_fraction": "", "train.max_steps": 2, "train.epochs": "",
        "train.global_batch_examples": 8, "samples.count": 0, "limits.device": "cpu", "limits.threads": 1,
        "track.tensorboard": "false", "train.seed": 1,
    }  # fmt: skip
    return [f"{path}={value}" for path, value in values.items()]


def flags(overrides: list[str]) -> list[str]:
    return [word for value in overrides for word in ("--set", value)]


def ended(run: Path) -> list[float]:
    events = list(read(run / "events.jsonl"))
    assert [e.outcome for e in events if isinstance(e, RunFinished)] == ["finished"]
    assert (run / "report.html").exists()
    return [e.loss for e in events if isinstance(e, Step)]


@pytest.mark.parametrize(("name", "_", "strategy", "method"), CASES, ids=NAMES)
def test_recipe(
    name: str, _: str, strategy: str, method: str, overrides: list[str], tiny_model: Path, chat_data: Path
) -> None:
    more = [f"model={tiny_model}", f"data.train={chat_data}", "output=run"]
    assert main(["train", str(EXAMPLES / f"{name}.yaml"), "--plain", *flags([*overrides, *more])]) == 0
    assert len(ended(Path("run"))) == 2
    layout = Plan.load(Path("run/plan.json")).layout
    assert (layout.strategy, layout.method) == (strategy, method)
    assert layout.devices == (1 if strategy == "single" else 2)


def script(name: str, *, model: Path, data: Path, more: list[str]) -> list[str]:
    path = EXAMPLES / f"{name.replace('-', '_')}.py"
    return [str(path), "--model", str(model), "--data", str(data), "--output", "run", *flags(more)]


# The first one runs below, under every launcher.
@pytest.mark.parametrize(("name", "_", "strategy", "method"), CASES[1:], ids=NAMES[1:])
def test_script(
    name: str,
    _: str,
    strategy: str,
    method: str,
    overrides: list[str],
    tiny_model: Path,
    chat_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = script(name, model=tiny_model, data=chat_data, more=overrides)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    assert len(ended(Path("run"))) == 2
    plan = Plan.load(Path("run/plan.json"))
    recipe = read_recipe(EXAMPLES / f"{name}.yaml").recipe
    assert (plan.layout.strategy, plan.layout.method) == (strategy, method)
    assert plan.recipe.lora == recipe.lora
    assert plan.recipe.limits.memory_gb == recipe.limits.memory_gb
    assert bool(plan.recipe.limits.offload_folder) == bool(recipe.limits.offload_folder)


def test_the_readmes_lines(chat_data: Path, in_tmp: Path) -> None:
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Path("my.jsonl").write_text("".join(chat_data.read_text(encoding="utf-8").splitlines(keepends=True)[:8]))
    exec(
        compile(
            lines.replace("effective_batch_size=8", "max_steps=1, recipe={'samples.count': 0}"), "README.md", "exec"
        ),
        {},
    )
    assert len(ended(Path("runs/from-python"))) == 1


LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_script_under_every_launcher(
    launcher: str, overrides: list[str], tiny_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    """A script without `if __name__ == "__main__"`; one that trains twice in the same processes, too."""
    words = script("ddp-7b", model=tiny_model, data=chat_data, more=overrides)
    once = Path(words[0]).read_text()
    again = once.replace("given.output", "given.output + '-again'") if launcher == "torchrun" else ""
    example = tmp_path / "example.py"
    example.write_text(once + again + "\nopen('ran.txt', 'a').write('once\\n')\n")
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], str(example), *words[1:]], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = ended(Path("run"))
    if again:
        assert losses == ended(Path("run-again"))
    events = list(read(Path("run/events.jsonl")))
    assert [e.strategy for e in events if isinstance(e, RunStarted)] == ["ddp"]
    plan = Plan.load(Path("run/plan.json"))
    assert (plan.layout.method, plan.layout.devices, plan.recipe.lora.r) == ("lora", 2, 16)
    ranks = [json.loads(path.read_text()) for path in Path("run/logs").glob("rank-*.json")]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    # Once in each process that a launcher starts, and in none that kitaeru does.
    assert Path("ran.txt").read_text().count("once") == (1 if launcher == "python" else 2)
    reference: Any = REFERENCE.setdefault("losses", losses)
    assert losses == pytest.approx(reference, rel=1e-6)


REFERENCE: dict[str, list[float]] = {}
