"""Reading recipes: layers and origins, and every kind of mistake with its line and its remedy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import Problem, RecipeError
from kitaeru.recipe.read import Origin, read

GOOD = "model: bundled\ndata: {train: a.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, **more: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        read(write(folder, text), **more)
    return list(caught.value.problems)


def problem(folder: Path, text: str, **more: Any) -> Problem:
    found = problems(folder, text, **more)
    assert len(found) == 1, found
    return found[0]


def test_shortest_recipe(tmp_path: Path) -> None:
    effective = read(write(tmp_path, GOOD))
    assert effective.recipe.model.name == "bundled"
    assert [source.path for source in effective.recipe.data.train] == ["a.jsonl"]
    assert effective.origins["model.name"] == Origin("file", str(tmp_path / "recipe.yaml"), 1)
    assert effective.origins["data.train"].line == 2
    assert effective.origins["train.seed"] == Origin("default")


def test_no_file_at_all() -> None:
    effective = read(None, overrides=["model=m/x", "data.train=[a.jsonl, {path: b, weight: 2}]"])
    assert [(s.path, s.weight) for s in effective.recipe.data.train] == [("a.jsonl", 1.0), ("b", 2.0)]
    assert effective.origins["data.train"] == Origin("flag", "--set")


def test_layers_the_later_the_stronger(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "preset: quick\nsamples: {count: 5}\ntrain:\n  seed: 1\n  beta1: 0.8\n")
    effective = read(path, values={"train.seed": 2, "method": None, "output": Path("out")}, overrides=["train.seed=3"])
    recipe, origins = effective.recipe, effective.origins
    assert (recipe.data.seq_len, origins["data.seq_len"].kind) == (512, "preset")
    assert (recipe.samples.count, origins["samples.count"].kind) == (5, "file")
    assert (recipe.samples.max_new_tokens, origins["samples.max_new_tokens"].source) == (64, "quick")
    assert (recipe.train.seed, origins["train.seed"]) == (3, Origin("flag", "--set"))
    assert (recipe.train.beta1, origins["train.beta1"].line) == (0.8, 7)
    assert (recipe.output, origins["output"]) == ("out", Origin("flag", "command line"))
    assert (recipe.method, origins["method"]) == ("auto", Origin("default"))
    assert effective.given == {
        "model.name",
        "data.train",
        "preset",
        "samples.count",
        "train.seed",
        "train.beta1",
        "output",
    }


def test_a_preset_from_the_command_line_lies_under_the_file(tmp_path: Path) -> None:
    effective = read(write(tmp_path, GOOD), overrides=["preset=quick"])
    assert effective.recipe.train.max_steps == 50
    path = write(tmp_path, GOOD.replace("}", ", seq_len: 99}"))
    assert read(path, overrides=["preset=quick"]).recipe.data.seq_len == 99


@pytest.mark.parametrize(
    ("file", "override", "wins", "gone"),
    [
        ("train: {max_steps: 9}", "train.epochs=2", "train.epochs", "train.max_steps"),
        ("preset: quick", "train.epochs=2", "train.epochs", "train.max_steps"),
        (
            "train: {global_batch_tokens: 64}",
            "train.global_batch_examples=2",
            "train.global_batch_examples",
            "train.global_batch_tokens",
        ),
        ("train: {warmup_steps: 64}", "train.warmup_fraction=0.5", "train.warmup_fraction", "train.warmup_steps"),
    ],
)
def test_an_alternative_takes_the_place_of_a_weaker_one(
    tmp_path: Path, file: str, override: str, wins: str, gone: str
) -> None:
    effective = read(write(tmp_path, GOOD + file), overrides=[override])
    section, name = gone.split(".")
    assert getattr(getattr(effective.recipe, section), name) is None
    assert effective.origins[wins].kind == "flag"
    assert effective.origins[gone].kind == "default"


def test_an_empty_value_takes_a_value_back(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "preset: quick\ntrain: {seed: 4, max_steps: }\nlora:\n")
    effective = read(path, overrides=["train.seed="])
    assert effective.recipe.train.seed == 0
    assert effective.recipe.train.max_steps is None
    assert effective.origins["train.max_steps"].kind == "file"


def test_yaml_12_values(tmp_path: Path) -> None:
    text = (
        GOOD
        + "train: {learning_rate: 2e-4, epsilon: 1e-5, epochs: 2, seed: 0x10}\n"
        + "samples: {prompts: [no, on, 2024-01-01]}\n"
    )
    recipe = read(write(tmp_path, text)).recipe
    assert (recipe.train.learning_rate, recipe.train.epsilon, recipe.train.epochs) == (2e-4, 1e-5, 2.0)
    assert recipe.train.seed == 16
    assert recipe.samples.prompts == ("no", "on", "2024-01-01")


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "model: bundled\ndata:\n  train:\n    - &a {path: x, weight: 2.0}\n    - {<<: *a, path: y}\n"
    assert [(s.path, s.weight) for s in read(write(tmp_path, text)).recipe.data.train] == [("x", 2.0), ("y", 2.0)]


def test_model_name_alone_keeps_the_other_model_values(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: a/b, quantize: nf4}\ndata: {train: a.jsonl}\n")
    model = read(path, overrides=["model=c/d"]).recipe.model
    assert (model.name, model.quantize) == ("c/d", "nf4")
    model = read(path, values={"model": "e/f", "model.revision": "main"}).recipe.model
    assert (model.name, model.revision, model.quantize) == ("e/f", "main", "nf4")


def test_a_text_on_the_command_line_is_taken_as_it_stands() -> None:
    base = ["model=x", "data.train=a.jsonl"]
    assert read(None, overrides=[*base, "data.system=a: b # c"]).recipe.data.system == "a: b # c"
    assert read(None, overrides=[*base, "model.revision=123"]).recipe.model.revision == "123"
    assert read(None, overrides=[*base, 'data.system="quoted"']).recipe.data.system == "quoted"
    assert read(None, overrides=[*base, "data.system=null"]).recipe.data.system is None


def test_paths_beside_the_recipe_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "model", there / "bundled"):
        folder.mkdir(parents=True)
    for path in (here / "both.jsonl", here / "only-here.jsonl", there / "both.jsonl", there / "chat.jinja"):
        path.touch()
    monkeypatch.chdir(here)
    train = "[both.jsonl, {path: only-here.jsonl}, no/where]"
    text = f"model: {{name: model, chat_template: chat.jinja}}\ndata: {{train: {train}}}\noutput: model\n"
    recipe = read(write(there, text)).recipe
    assert recipe.model.name == str(there / "model")
    assert recipe.model.chat_template == str(there / "chat.jinja")
    assert [s.path for s in recipe.data.train] == [str(there / "both.jsonl"), "only-here.jsonl", "no/where"]
    assert recipe.output == "model"
    assert read(write(there, GOOD)).recipe.model.name == "bundled"
    # What the command line names is relative to where the person stands.
    assert read(write(there, GOOD), values={"data.train": "both.jsonl"}).recipe.data.train[0].path == "both.jsonl"


def test_beside_the_recipe_of_a_run_lie_results_not_sources(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = write(tmp_path, GOOD.replace("bundled", "model"))
    assert read(path).recipe.model.name == str(tmp_path / "model")
    (tmp_path / "plan.json").touch()
    assert read(path).recipe.model.name == "model"


# Mistakes


def test_everything_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
model: bundled
learning_rate: 1e-4
data:
  train: a.jsonl
  packing: no
  seq_len: 3.5
train:
  learing_rate: 1e-5
  seed: -1
  max_steps: 2
  max_steps: 3
lora: {r: 8}
method: full
strategy: tensors
"""
    found = problems(tmp_path, text, overrides=["limits.threads=x"])
    assert [(p.line, p.path) for p in found] == [
        (2, "learning_rate"),
        (5, "data.packing"),
        (6, "data.seq_len"),
        (8, "train.learing_rate"),
        (9, "train.seed"),
        (11, "train.max_steps"),
        (12, "lora.r"),
        (14, "strategy"),
        (0, "limits.threads"),
    ]
    assert {p.source for p in found} == {str(tmp_path / "recipe.yaml"), "--set"}
    assert all(p.remedy for p in found)


@pytest.mark.parametrize(
    ("line", "path", "what", "remedy"),
    [
        (
            "train: {learing_rate: 1}",
            "train.learing_rate",
            "unknown key `learing_rate`",
            "Did you mean `learning_rate`?",
        ),
        ("learning_rate: 1", "learning_rate", "unknown key `learning_rate`", "`learning_rate` belongs under `train`."),
        (
            "lora: {output: x}",
            "lora.output",
            "unknown key `output`",
            "`output` belongs at the top of the recipe, not in a section.",
        ),
        ("lora: {lora_alpha: 1}", "lora.lora_alpha", "unknown key `lora_alpha`", "Here it is called `alpha`."),
        ("max_seq_length: 1", "max_seq_length", "unknown key `max_seq_length`", "Here it is `seq_len` under `data`."),
        ("Method: lora", "Method", "unknown key `Method`", "Did you mean `method`?"),
        ("train.seed: 3", "train.seed", "unknown key `train.seed`", "Write `seed` under `train:`, indented."),
        (
            "samples: {zzz: 3}",
            "samples.zzz",
            "unknown key `zzz`",
            "Valid here: prompts, system, count, max_new_tokens.",
        ),
        (
            "train: {seed: 3.5}",
            "train.seed",
            "3.5 is not a whole number",
            "It is a whole number, ≥ 0, for example: seed: 1",
        ),
        ("train: {max_steps: 1e3}", "train.max_steps", "1000.0 is not a whole number", "Write 1000."),
        (
            "train: {seed: true}",
            "train.seed",
            "true is not a whole number",
            "It is a whole number, ≥ 0, for example: seed: 1",
        ),
        (
            'train: {learning_rate: "1e-4"}',
            "train.learning_rate",
            '"1e-4" is not a number',
            "It is a number, > 0, for example: learning_rate: 2e-4",
        ),
        ("lora: {dora: no}", "lora.dora", '"no" is text', "Write false."),
        ("lora: {dora: 1}", "lora.dora", "1 is a number", "Write true."),
        (
            "lora: {dora: maybe}",
            "lora.dora",
            '"maybe" is neither true nor false',
            "It is true or false, for example: dora: true",
        ),
        ("output: 5", "output", "5 is not text", 'Put it in quotes: "5".'),
        ("output: [a]", "output", "[a] is not one text", "It is text, for example: output: runs/my-first"),
        ("method: qlroa", "method", '"qlroa" is not one of auto, full, lora, qlora, pretrain', "Did you mean `qlora`?"),
        (
            "method: 5",
            "method",
            "5 is not one of auto, full, lora, qlora, pretrain",
            "Take one of these, or leave `method` out.",
        ),
        (
            "train: 5",
            "train",
            "5 stands where a section is expected",
            "It is a section, for example: train: {max_steps: 100}",
        ),
        (
            "lora: {targets: 5}",
            "lora.targets",
            "5 is not a list of texts",
            "It is a list of texts, for example: targets: [q_proj, v_proj]",
        ),
        ("lora: {targets: []}", "lora.targets", "the list is empty", "For example: targets: [q_proj, v_proj]"),
        ("lora: {targets: [q, 5]}", "lora.targets[1]", "5 is not text", 'Put it in quotes: "5".'),
        ("train: {seed: -1}", "train.seed", "-1 is out of range", "It must be ≥ 0."),
        ("train: {beta1: 1}", "train.beta1", "1 is out of range", "It must be ≥ 0 and < 1."),
        ("train: {learning_rate: .inf}", "train.learning_rate", ".inf is not a finite number", ""),
        ("preset: quik", "preset", 'there is no preset "quik"', "Did you mean `quick`?"),
        ("preset: 5", "preset", "5 is not text", 'Put it in quotes: "5".'),
        ("output: !x y", "output", "unknown tag !x", "Remove the tag."),
    ],
)
def test_one_mistake(tmp_path: Path, line: str, path: str, what: str, remedy: str) -> None:
    found = problem(tmp_path, GOOD + line + "\n")
    assert (found.path, found.what, found.remedy, found.line) == (path, what, remedy, 3)


@pytest.mark.parametrize(
    ("data", "path", "what"),
    [
        ("{train: [{file: x}]}", "data.train[0].path", "`path` is missing"),
        ("{train: [{path: x, type: text}]}", "data.train[0].type", "unknown key `type`"),
        ("{train: [{path: x, columns: {a: 1}}]}", "data.train[0].columns.a", "1 is not text"),
        ("{train: [{path: x, weight: 0}]}", "data.train[0].weight", "0 is out of range"),
        ("{train: [5]}", "data.train[0]", "5 is not a source of examples"),
        ("{train: 5}", "data.train", "5 is not a source of examples"),
        ("{train: []}", "data.train", "the list is empty"),
        ("{valid: x}", "data.train", "the recipe does not say what to train on"),
        ("my.jsonl", "data", '"my.jsonl" stands where a section is expected'),
    ],
)
def test_mistakes_in_sources(tmp_path: Path, data: str, path: str, what: str) -> None:
    found = problems(tmp_path, f"model: bundled\ndata: {data}\n")
    assert (path, what) in [(p.path, p.what) for p in found]
    assert all(p.line == 2 and p.remedy for p in found)


def test_missing_model_and_data(tmp_path: Path) -> None:
    found = problems(tmp_path, "")
    assert [(p.path, p.remedy) for p in found] == [
        ("model", "For example: model: bundled"),
        ("data", "For example: data: {train: my.jsonl}"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("model: x\ntrain:\n\tseed: 3\n", 3, "Indent with spaces, not with a tab."),
        (
            "model: x\ndata: {train: a\n",
            2,
            "Check the quotes, brackets and indentation on this line and the one before.",
        ),
        ("model: x\nmethod：lora\n", 2, "The line has a full-width “：”; YAML needs the half-width one."),
        (
            "model： x\ndata: {train: a}\n",
            2,
            "The line before has a full-width “：”; YAML needs the half-width one.",
        ),
        ("model: x\noutput: a: b\n", 2, 'Put a text that contains ": " in quotes.'),
    ],
)
def test_what_is_not_yaml(tmp_path: Path, text: str, line: int, remedy: str) -> None:
    found = problem(tmp_path, text)
    assert (found.line, found.remedy) == (line, remedy)
    assert found.what.startswith("this is not YAML (column ")


def test_no_such_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read(tmp_path / "recipes.yaml")
    (found,) = caught.value.problems
    assert found.what == "there is no such file"
    assert found.remedy == f"Did you mean {tmp_path / 'recipe.yaml'}?"


def test_not_a_recipe(tmp_path: Path) -> None:
    assert problem(tmp_path, "- a\n- b\n").what == "this is not a recipe: no `name: value` lines"
    assert "contains itself" in problem(tmp_path, GOOD + "lora: {targets: &a [x, *a]}\n").what
    assert "another document" in problem(tmp_path, GOOD + "---\n" + GOOD).what


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(GOOD.encode() + "output: 出力\n".encode("shift_jis"))
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert [(p.what, p.line) for p in caught.value.problems] == [("the file is not UTF-8", 3)]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read(path).recipe.model.name == "bundled"


def test_no_such_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"Did you mean .*recipe\.yaml"):
        read(tmp_path / "recipe.yml")
    with pytest.raises(RecipeError, match="Name a file in it"):
        read(tmp_path)


def test_mistakes_in_overrides() -> None:
    with pytest.raises(RecipeError) as caught:
        read(None, overrides=["model=x", "data.train=[a, {", "train.seed", "=3", "train.sed=3"])
    assert [(p.path, p.what.split(" (")[0]) for p in caught.value.problems] == [
        ("data.train", "this is not YAML"),
        ("", '"train.seed" does not say what to set'),
        ("", '"=3" does not say what to set'),
        ("train.sed", "unknown key `sed`"),
    ]


def test_clash_names_both_places(tmp_path: Path) -> None:
    found = problem(
        tmp_path,
        GOOD + "limits: {device: cpu}\n",
        overrides=["train.precision=fp16"],
    )
    assert (found.path, found.source) == ("train.precision", "--set")
    assert "recipe.yaml:3" in found.what


def test_a_clash_is_not_reported_on_top_of_the_mistake_that_makes_it(tmp_path: Path) -> None:
    found = problem(tmp_path, GOOD + "train: {early_stop: x}\n")
    assert found.what == '"x" is not a whole number'


def test_read_only_looks_whether_paths_exist(tmp_path: Path) -> None:
    """A path no file can have is no reason to fail here."""
    long = "x" * 5000
    assert read(write(tmp_path, f"model: bundled\ndata: {{train: {long}}}\n")).recipe.data.train[0].path == long
    shutil.rmtree(tmp_path)
