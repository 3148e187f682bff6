"""What both READMEs tell a stranger to type works, and is the same in both languages."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from kitaeru.cli import main

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.ja.md")
FENCE = re.compile(r"(?:<!-- not run: (?P<needs>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```\n", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of shell commands; `needs` says why it is not run here, if it is not."""

    body: str
    needs: str

    @property
    def is_make(self) -> bool:
        return self.body.startswith("make ")


def blocks(name: str) -> list[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [Block(m["body"], m["needs"] or "") for m in FENCE.finditer(text) if m["language"] == "bash"]
    assert len(found) == text.count("```bash"), "a block that this test does not see"
    return found


def commands(block: Block) -> list[list[str]]:
    """The block's lines as words; lines inside a here-document are no commands."""
    body = re.sub(r"(<<'EOF'\n).*?\nEOF\n", r"\1", block.body, flags=re.DOTALL)
    return [shlex.split(line) for line in body.splitlines()]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, text=True, capture_output=True, timeout=300)


def kitaeru(*words: str) -> subprocess.CompletedProcess[str]:
    """The verb in this process, where everything is imported already."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def test_both_languages_show_the_same_commands() -> None:
    english, japanese = map(blocks, READMES)
    assert english == japanese


def test_both_languages_list_the_same_verbs() -> None:
    def listed(name: str) -> list[str]:
        return re.findall(r"^\| `(kitaeru [^`]+)`", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert listed(READMES[0]) == listed(READMES[1])
    assert len(listed(READMES[0])) >= 9


def test_listed_verbs_exist() -> None:
    for line in re.findall(r"^\| `kitaeru ([^`]+)`", (ROOT / READMES[0]).read_text(encoding="utf-8"), re.MULTILINE):
        verb = [word for word in line.split() if re.fullmatch("[a-z]+", word)]
        help_text = kitaeru(*verb, "--help")
        assert help_text.returncode == 0, help_text.stderr
        assert verb[-1] in help_text.stdout


def test_links_lead_somewhere() -> None:
    for name in (*READMES, "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{name} → {target}"


@pytest.mark.parametrize("block", [b for b in blocks(READMES[0]) if b.is_make], ids=lambda b: b.body.strip())
def test_make_targets_exist(block: Block) -> None:
    for words in commands(block):
        planned = run(*words, "--dry-run", "--always-make")
        assert planned.returncode == 0, planned.stderr
        assert "scripts/setup.sh" in planned.stdout, "every target sets up first"


@pytest.mark.slow
def test_commands_run_as_written(bundled: Path, tmp_path: Path) -> None:
    """All runnable blocks in one shell, in the order a reader types them, in a folder like a fresh clone."""
    venv = Path(sys.executable).parents[1]
    (tmp_path / ".venv").symlink_to(venv)
    script = "set -eux\n" + "".join(b.body for b in blocks(READMES[0]) if not b.needs and not b.is_make)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        input="おはようございます。\n",
        text=True,
        capture_output=True,
        timeout=540,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run_folder = tmp_path / "runs" / "mine"
    assert (run_folder / "report.html").stat().st_size > 10_000
    assert (run_folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("block", [b for b in blocks(READMES[0]) if b.needs], ids=lambda b: b.needs)
def test_commands_not_run_are_at_least_right(block: Block) -> None:
    """A block that needs a GPU or a network: its verbs exist and its recipes are valid."""
    for program, verb, *rest in commands(block):
        assert program == "kitaeru"
        assert kitaeru(verb, "--help").returncode == 0
        for word in rest:
            if word.endswith(".yaml"):
                shown = kitaeru("recipe", "show", word)
                assert shown.returncode == 0, shown.stderr
                assert re.search(r"qlora", shown.stdout)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_example_recipes_are_valid(recipe: Path) -> None:
    shown = kitaeru("recipe", "show", str(recipe))
    assert shown.returncode == 0, shown.stderr
