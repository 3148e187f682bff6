"""`kitaeru recipe`: what a person and a program read."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from kitaeru.cli import main
from kitaeru.plan.types import Candidate, Decision, Layout, Plan
from kitaeru.recipe import presets
from kitaeru.recipe.fields import leaves, table
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe

GOOD = """\
model: bundled
data:
  train: a.jsonl
  system: あなたは親切で正確な日本語の助手です。質問には短く答えてください。
preset: quick
"""


@pytest.fixture
def recipe(in_tmp: Path) -> Path:
    path = Path("recipe.yaml")
    path.write_text(GOOD, encoding="utf-8")
    return path


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_show(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipe", "show", str(recipe), "--set", "train.seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(width, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["name", "bundled", "recipe.yaml:1"] in rows
    assert ["train", "a.jsonl", "recipe.yaml:3"] in rows
    assert ["seq_len", "512", "preset", "quick"] in rows
    assert ["seed", "7", "--set"] in rows
    assert ["epochs", "–", "default"] in rows
    assert {row[0] for row in rows if row} >= {spec.name for spec in leaves()}


def test_show_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", str(recipe), "--json", "--set", "train.seed=7"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["recipe"]["train"]["seed"] == 7
    assert value["origins"]["train.seed"] == {"kind": "flag", "source": "--set", "line": 0}
    assert value["origins"]["data.train"] == {"kind": "file", "source": "recipe.yaml", "line": 3}
    assert set(value["origins"]) == {spec.path for spec in leaves()}


def test_show_takes_the_folder_of_a_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "."]) == 0
    assert "a.jsonl" in capsys.readouterr().out


def test_show_a_wrong_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(GOOD + "sed: 1\nmethod: [x\n")
    assert main(["recipe", "show", str(recipe)]) == 2
    recipe.write_text(GOOD + "sed: 1\nmethod: x\n")
    capsys.readouterr()
    assert main(["recipe", "show", str(recipe)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "The recipe has 2 problems:"
    assert err[1] == "recipe.yaml:6: sed: unknown key `sed`"
    assert err[3].startswith('recipe.yaml:7: method: "x" is not one of auto, ')


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "explain", "train.learning_rate"]) == 0
    out = capsys.readouterr().out
    for part in ("train.learning_rate", "2e-4 for LoRA", "a number, > 0", "learning_rate: 2e-4"):
        assert part in out
    assert main(["recipe", "explain"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in table() if "." not in name)
    assert main(["recipe", "explain", "data.trian"]) == 2
    assert "Did you mean `data.train`?" in capsys.readouterr().err


def test_schema(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["title"] == "kitaeru recipe"
    assert main(["recipe", "schema", "-o", "s.json"]) == 0
    assert Path("s.json").read_text(encoding="utf-8") == printed


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "presets"]) == 0
    out = capsys.readouterr().out
    for name in presets.PRESETS:
        assert name in out
        assert "".join(presets.text(name).split()) in "".join(out.split())


def test_show_names_what_the_planner_will_decide(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", str(recipe), "--set", "limits.device=cpu", "--set", "method=auto"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["micro_batch_tokens", "–", "planner"] in rows
    assert ["method", "auto", "planner"] in rows
    assert ["device", "cpu", "--set"] in rows
    assert "`--plan` shows it now" in out


def test_show_a_run_with_what_its_planner_decided(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wish = read(recipe).recipe
    plain = wish.model_dump(mode="json")
    plain["method"], plain["train"]["learning_rate"] = "lora", 2e-4
    layout = Layout("single", "lora", "none", "fp32", "keep", 512, "cpu")
    why = "usual for an adapter"
    Plan(
        recipe=Recipe.model_validate_json(json.dumps(plain)),
        chosen=Candidate(layout, {"weights": 1}, 0, fits=True),
        decisions=(Decision("train.learning_rate", 2e-4, why), Decision("method", "lora", "it fits")),
    ).save(Path("plan.json"))
    assert main(["recipe", "show", "."]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["learning_rate", "0.0002", "planner"] in rows
    assert ["train.learning_rate", *why.split()] in rows
    assert "--plan" not in out
    assert main(["recipe", "show", ".", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["recipe"]["method"] == "lora"
    assert value["why"] == {"train.learning_rate": why, "method": "it fits"}
    assert value["origins"]["method"]["kind"] == "planner"
    assert value["origins"]["data.train"]["kind"] == "file"
    # Other values than those of the run: its plan says nothing about them.
    assert main(["recipe", "show", ".", "--json", "--set", "train.seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["why"] == {}


def test_show_with_a_plan_made_now(
    tiny_model: Path, chat_data: Path, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    Path("r.yaml").write_text(f"model: {tiny_model}\ndata: {{train: {chat_data}, valid_fraction: 0.25}}\n")
    words = ["recipe", "show", "r.yaml", "--set", "limits.device=cpu"]
    assert main([*words, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main([*words, "--plan", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["recipe"]["method"] == "lora"
    assert after["recipe"]["limits"]["micro_batch_tokens"] > 0
    decided = {path for path, origin in after["origins"].items() if origin["kind"] == "planner"}
    assert {path for path, origin in before["origins"].items() if origin["kind"] == "planner"} == decided
    assert decided == set(after["why"])
    assert main([*words, "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert after["why"]["train.learning_rate"] in shown
    assert not Path("runs").exists()
