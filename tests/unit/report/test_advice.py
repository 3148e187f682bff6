"""Advice: each rule finds its ailment, figures say where they come from, and both twins say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kitaeru.cli import main
from kitaeru.errors import UsageError
from kitaeru.events import Devices, Evaluated, Event, Reading, Saved, SteppedDown
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.choose import make_plan
from kitaeru.plan.types import DataFacts
from kitaeru.recipe.read import read
from kitaeru.report.advice import Facts, advise, from_model, from_recipe, from_run, pages, ran_in
from kitaeru.report.advice.assemble import SHELF, next_changes
from kitaeru.report.advice.facts import FREE, changed
from kitaeru.report.advice.next import next_change
from kitaeru.report.advice.rules import RULES, findings
from kitaeru.report.page import write_page
from kitaeru.shape import catalogue, find_shape

ELYZA = "elyza/Llama-3-ELYZA-JP-8B"
SMALL = "llm-jp/llm-jp-3-150m"
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def pair() -> Hardware:
    return parse_gpus("2x RTX A5000", "128GB")


def wish(model: str, **values: object) -> Facts:
    hardware = parse_gpus("2x RTX A5000", "128GB")
    paths = {path.replace("__", "."): value for path, value in values.items()}
    recipe = read(None, values={"model": model, "data.train": ["d.jsonl"], **paths}).recipe
    return Facts(from_recipe("r.yaml", recipe, hardware), hardware)


def names(facts: Facts) -> set[str]:
    return {finding.name for finding in findings(facts)}


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_leaves_all_open_has_no_fault() -> None:
    assert names(wish(SMALL)) <= {"unused-memory", "host", "four-bits"}
    assert next_changes(wish(ELYZA, method="qlora")) == []


@pytest.mark.parametrize(
    ("name", "model", "values"),
    [
        ("idle-gpus", ELYZA, {"strategy": "single"}),
        ("unused-memory", SMALL, {"strategy": "single"}),
        ("no-packing", ELYZA, {"data__packing": False}),
        ("small-micro-batch", SMALL, {"limits__micro_batch_tokens": 512, "data__seq_len": 512}),
        ("recompute", SMALL, {"limits__checkpointing": True}),
        ("no-accumulation", ELYZA, {"train__global_batch_examples": 2}),
        ("fp32", SMALL, {"train__precision": "fp32"}),
        ("attention", SMALL, {"model__attention": "eager"}),
        ("four-bits", ELYZA, {"method": "lora"}),
        (
            "layers-in-turn",
            ELYZA,
            {"method": "qlora", "strategy": "model_parallel", "limits__micro_batch_tokens": 16384},
        ),
        ("bubble", ELYZA, {"method": "qlora", "strategy": "pipeline", "limits__micro_batch_tokens": 8192}),
        (
            "link",
            ELYZA,
            {"method": "lora", "strategy": "fsdp", "data__seq_len": 512, "limits__micro_batch_tokens": 512},
        ),
        ("sixteen-bits", ELYZA, {"method": "qlora"}),
        (
            "host",
            SMALL,
            {"limits__micro_batch_tokens": 512, "data__seq_len": 512, "train__cuda_graphs": False},
        ),
        ("does-not-fit", "codellama/CodeLlama-34b-hf", {"method": "lora", "strategy": "single"}),
    ],
)
def test_a_rule_finds_its_ailment(name: str, model: str, values: dict[str, object]) -> None:
    if "model__attention" in values:  # a section of its own
        values = {"model": {"name": model, "attention": values["model__attention"]}}
        recipe = read(None, values={"data.train": ["d.jsonl"], **values}).recipe
        hardware = parse_gpus("2x RTX A5000", "128GB")
        facts = Facts(from_recipe("r.yaml", recipe, hardware), hardware)
    else:
        facts = wish(model, **values)
    assert name in names(facts)
    finding = next(found for found in findings(facts) if found.name == name)
    assert finding.what.endswith(".")
    assert "{" not in finding.what + finding.why
    mended = changed(facts.today.recipe, {**FREE, **finding.change})
    if finding.change:
        again = Facts(from_recipe("r.yaml", mended, facts.hardware), facts.hardware)
        assert name not in names(again) or name in ("unused-memory", "host")


def _ran(
    made: ModuleType,
    folder: Path,
    *,
    hardware: Hardware,
    values: dict[str, object],
    extra: list[Event],
    scale: float = 1.0,
    clock: dict[str, Any] | None = None,
) -> Path:
    """A run of 60 steps as its plan says, `scale` times as fast as predicted, with more events."""
    recipe = read(None, values={"model": ELYZA, "data.train": ["d.jsonl"], **values}).recipe
    read_ = made.data()
    facts = DataFacts(read_[0].examples, read_[0].tokens, read_[0].longest, read_[1].examples)
    plan = make_plan(recipe, hardware, find_shape(ELYZA), facts)
    assert plan.chosen.speed is not None
    rate, peak = plan.chosen.speed.tokens_per_second * scale, plan.chosen.peak_bytes
    start = replace(made.started(60), model=ELYZA, method=plan.layout.method, strategy=plan.layout.strategy)
    measured = {"tokens_per_second": rate, "peak_bytes": peak, **(clock or {})}
    steps = [replace(made.step(n, 60), **measured) for n in range(1, 61)]
    made.write(folder, 60, [[start, *read_, *steps, *extra, *made.finish(60)]], with_plan=False)
    plan.save(folder / "plan.json")
    written = read(None, values={"model": ELYZA, "data.train": ["d.jsonl"], **values}).recipe
    (folder / "recipe.yaml").write_text(
        "\n".join(["model: " + ELYZA, "data: {train: d.jsonl}", f"method: {written.method}",
                   f"strategy: {written.strategy}", f"limits: {{devices: {written.limits.devices or 'null'}}}"]),
        encoding="utf-8",
    )  # fmt: skip
    return folder


def _looked(made: ModuleType, **reading: Any) -> list[Event]:
    one = Reading(device="0", name="RTX A5000", **reading)
    return [Devices(time=made.T0 + 3 + n, step=n, host="h", readings=(one,)) for n in range(5)]


def _looks(made: ModuleType, losses: list[float], seconds: float = 0.1) -> list[Event]:
    count = len(losses)
    return [Evaluated(time=made.T0 + 2 + 36 * n / count, step=60 * n // count, loss=loss, tokens=9, seconds=seconds)
            for n, loss in enumerate(losses, 1)]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "validation",
        "saving",
        "by-heart",
        "still-learning",
        "slower-than-planned",
        "throttled",
        "data",
        "slow-rank",
        "stepped-down",
    ],
)
def test_a_run_tells_what_a_recipe_cannot(name: str, made: ModuleType, tmp_path: Path, pair: Hardware) -> None:
    saves: list[Event] = [Saved(time=made.T0 + n, step=n, path="c", bytes=1, seconds=1.0) for n in range(5, 60, 5)]
    extra: dict[str, list[Event]] = {
        "validation": _looks(made, [2.0] * 10, seconds=2.0),
        "saving": saves,
        "by-heart": _looks(made, [2.0, 1.8, 1.9, 2.0, 2.2, 2.4]),
        "still-learning": _looks(made, [2.6, 2.4, 2.2, 2.0, 1.8, 1.6]),
        "throttled": _looked(made, throttles=("too hot",)),
        "stepped-down": [
            SteppedDown(time=made.T0 + 5, step=2, micro_batch_tokens=2048, activations="keep",
                        planned_micro_batch_tokens=4096, planned_activations="keep")
        ],
    }  # fmt: skip
    clock: dict[str, dict[str, Any]] = {
        "data": {"rank_seconds": (0.3, 0.3), "data_seconds": 0.2},
        "slow-rank": {"rank_seconds": (0.3, 0.55)},
    }
    scale = 0.5 if name == "slower-than-planned" else 1.0
    more = extra.get(name, [])
    folder = _ran(made, tmp_path / "run", hardware=pair, values={"method": "qlora"}, extra=more, scale=scale,
                  clock=clock.get(name, {}))  # fmt: skip
    rules = {"validation", "saving", "by-heart", "still-learning", "slower-than-planned", "throttled", "data",
             "slow-rank", "stepped-down"}  # fmt: skip
    told = rules & names(Facts(from_run(folder), pair))
    assert told == {name}


def test_cut_examples_are_found_in_either_language(made: ModuleType, tmp_path: Path, pair: Hardware) -> None:
    from kitaeru.i18n import in_every_language

    for number, words in enumerate(in_every_language("too long, the end cut off")):
        folder = _ran(made, tmp_path / str(number), hardware=pair, values={}, extra=[])
        log = folder / "events.jsonl"
        text = log.read_text(encoding="utf-8").replace('longer than seq_len: truncated": 12', f'{words}": 300')
        log.write_text(text, encoding="utf-8")
        assert "cut-examples" in names(Facts(from_run(folder), pair))


@pytest.mark.parametrize("name", ["shared-gpu", "container", "no-peer-access"])
def test_the_machine_is_looked_at(name: str, pair: Hardware) -> None:
    devices = pair.devices
    machines = {
        "shared-gpu": replace(
            pair, described=False, devices=tuple(replace(d, free_bytes=d.memory_bytes // 2) for d in devices)
        ),
        "container": replace(pair, container="docker"),
        "no-peer-access": replace(pair, devices=tuple(replace(d, p2p=False) for d in devices)),
    }
    machine = machines[name]
    assert name in names(Facts(from_model(SMALL, machine), machine))
    assert name not in names(Facts(from_model(SMALL, pair), pair))


def test_rules_have_distinct_names(pair: Hardware) -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES) >= 24


# --- the page ---------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Elements closed in order; text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def baseline() -> tuple[str, str]:
    hardware = parse_gpus("2x RTX A5000", "128GB")
    facts = Facts(from_model(ELYZA, hardware), hardware, ("--gpus", "2x RTX A5000"))
    return pages(advise(facts))


def test_the_baseline_of_two_a5000(baseline: tuple[str, str]) -> None:
    html, markdown = baseline
    for title in ("Today", "Problems found", "What is possible", "Ways to train", "Strategy by model size",
                  "Models for this hardware", "Action plan", "Where the figures come from"):  # fmt: skip
        assert f"## {title}" in markdown
    rows = {line.split(" | ")[0].strip("| "): line for line in markdown.splitlines() if line.startswith("| ")}
    assert "| 1 of 2 | 2 of 2 | 2.00 |" in rows["GPUs at work"]
    small, large = re.findall(r"([\d.]+) B \(predicted", rows["largest known model"])
    assert float(large) > 4 * float(small)
    assert re.search(r"kitaeru train elyza/Llama-3-ELYZA-JP-8B --data my.jsonl", markdown)
    assert "kitaeru plan elyza/Llama-3-ELYZA-JP-8B --gpus '2x RTX A5000' --what-if 'add 1 GPU'" in markdown
    for model in list(SHELF)[:4]:
        assert model in markdown
    assert re.search(r"kitaeru train \S+70B\S* --data my.jsonl$", markdown, re.MULTILINE)
    outline = Outline(html)
    # Four memory bars, a bar for each way, two lanes for each day, and the curve of scaling.
    assert outline.tags.count("svg") >= 4 + 5 + 2 * 5 + 1


def test_what_one_card_trains_from_a_disk() -> None:
    hardware = parse_gpus("1x RTX 3090", "64GB")
    _, markdown = pages(advise(Facts(from_model(ELYZA, hardware), hardware, ("--gpus", "1x RTX 3090"))))
    assert re.search(r"kitaeru train \S+ --data my.jsonl --set limits.offload_folder=offload", markdown)


def test_the_twins_say_the_same(baseline: tuple[str, str]) -> None:
    html, markdown = baseline
    text = " ".join(" ".join(Outline(html).words).split())
    for line in markdown.splitlines():
        plain = re.sub(r"\\(.)", r"\1", line)
        # What only drawings show as pictures stands in tables in the Markdown.
        if re.match(r"(- )?\*\*|[A-Z]", plain) and not plain.startswith(("- **", "A factor")):
            assert " ".join(plain.replace("**", "").split()) in text or "Predicted" in plain, plain
    for number in re.findall(r"^\d+\. \*\*(?:predicted|measured|stated)\*\*: (.*)$", markdown, re.MULTILINE):
        assert re.sub(r"\\(.)", r"\1", number) in text


def test_every_figure_has_a_source_that_is_listed(baseline: tuple[str, str]) -> None:
    html, markdown = baseline
    outline = Outline(html)
    wanted = {value for name, value in outline.attributes if name == "href" and value.startswith("#source-")}
    there = {f"#{value}" for name, value in outline.attributes if name == "id"}
    assert wanted
    assert wanted <= there
    for table in re.findall(r"(?:^\|.*\n)+\n(.*)", markdown, re.MULTILINE):
        whole = "(predicted" in table or "(measured" in table
        assert whole or "## What is possible" in markdown  # the comparison marks each cell instead
    assert not re.search(
        r"nan|inf\b", " ".join(value for name, value in outline.attributes if name in ("x", "width", "d"))
    )


def test_nothing_comes_from_the_network(baseline: tuple[str, str]) -> None:
    html, _ = baseline
    outline = Outline(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'" in html
    assert {value for name, value in outline.attributes if name == "src"} == set()
    assert all(value.startswith(("#", "data:")) for name, value in outline.attributes if name == "href")


def test_text_of_others_is_escaped(pair: Hardware) -> None:
    today = replace(from_model(SMALL, pair), name="<script>alert(1)</script> & *bold*")
    html, markdown = pages(advise(Facts(today, pair)))
    assert Outline(html).tags.count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; *bold*" in html
    assert r"\<script\>alert(1)\</script\> & \*bold\*" in markdown


def test_what_you_say_you_have_is_called_stated(pair: Hardware) -> None:
    today = from_model(SMALL, pair, stated=100.0)
    assert today.rate is not None
    assert (today.rate.value, today.rate.basis.kind) == (100.0, "stated")
    facts = Facts(today, pair)
    assert "slower-than-planned" in names(facts)  # and by how much, if it is true
    assert "slower-than-planned" not in names(Facts(from_model(SMALL, pair), pair))
    assert facts.best is not None
    promise = facts.promise(facts.best)
    # A stated figure says nothing of the planner: it corrects no prediction.
    assert promise is not None
    assert facts.best.speed is not None
    assert promise.value == facts.best.speed.tokens_per_second


def test_the_shelf_is_in_the_catalogue() -> None:
    assert set(SHELF) <= {entry.name for entry in catalogue()}


# --- runs -------------------------------------------------------------------------------------------------------------


def test_before_and_after(made: ModuleType, tmp_path: Path, pair: Hardware) -> None:
    one = {"strategy": "single", "limits.devices": 1, "method": "qlora"}
    before = _ran(made, tmp_path / "before", hardware=pair, values=one, extra=[], scale=0.9)
    after = _ran(made, tmp_path / "after", hardware=pair, values={"method": "qlora"}, extra=[], scale=0.9)
    facts = Facts(from_run(before), pair)
    assert facts.best is not None
    promise = facts.promise(facts.best)
    now = ran_in(after).rate
    # The planner was a tenth too high for the first run, so it is taken to be so for the second.
    assert promise is not None
    assert promise.value == pytest.approx(now.value, rel=0.01)
    assert promise.basis.kind == "predicted"
    assert "0.90" in promise.basis.source
    _, markdown = pages(advise(facts, [ran_in(before), ran_in(after)]))
    assert "| as promised |" in markdown
    assert "(measured [" in markdown
    times = re.search(r"trains at ([\d.]+) times the speed", markdown)
    assert times is not None
    assert 1.8 < float(times[1]) < 2.1


def test_the_page_of_a_run_offers_the_next_change(made: ModuleType, tmp_path: Path, pair: Hardware) -> None:
    values = {"strategy": "single", "limits.devices": 1, "method": "qlora"}
    folder = _ran(made, tmp_path / "run", hardware=pair, values=values, extra=[])
    html = write_page(folder).read_text(encoding="utf-8")
    assert "Next best change" in html
    assert "GPUs at work: 1 of 2." in html
    found = re.search(
        r"kitaeru train \S+recipe.yaml --set strategy=auto --set limits.devices= --output runs/quickstart-2", html
    )
    assert found is not None
    assert f"kitaeru advise {folder}" in html


@pytest.mark.parametrize("name", ["killed", "begun", "finished"])
def test_a_run_that_cannot_be_judged_has_no_such_section(make: Folder, name: str) -> None:
    assert next_change(make(name)) == ""


def test_a_run_without_steps_or_plan_is_refused(make: Folder) -> None:
    with pytest.raises(UsageError, match="no step"):
        from_run(make("begun"))
    with pytest.raises(UsageError, match=r"plan\.json"):
        from_run(make("killed"))


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_writes_both(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", SMALL, "--gpus", "2x RTX A5000", "--ram", "128GB", "-o", "out/page", "--lang", "ja"]
    (in_tmp / "out").mkdir()
    assert main(words) == 0
    assert '<html lang="ja">' in Path("out/page.html").read_text(encoding="utf-8")
    assert Path("out/page.md").read_text(encoding="utf-8").startswith("# ")
    assert "out/page.html" in capsys.readouterr().out


def test_the_verb_answers_programs(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", SMALL, "--gpus", "2x RTX A5000", "--speed", "100", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["page"]).is_file()
    assert answer["today"]["tokens_per_second"]["basis"]["kind"] == "stated"
    assert answer["possible"]["tokens_per_second"]["low"] > 100
    assert {"idle-gpus", "no-packing"} <= {finding["name"] for finding in answer["findings"]}
    assert answer["actions"][0]["commands"] == [f"kitaeru train {SMALL} --data my.jsonl"]


def test_the_verb_takes_a_recipe_and_its_data(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 30
    Path("d.jsonl").write_text(rows, encoding="utf-8")
    Path("r.yaml").write_text("model: bundled\ndata: {train: d.jsonl, packing: false}\n", encoding="utf-8")
    assert main(["advise", "r.yaml", "--data", "d.jsonl", "--gpus", "RTX 3090"]) == 0
    assert "kitaeru train r.yaml --set data.packing=true" in capsys.readouterr().out
    assert "tokens on average" in Path("advice.md").read_text(encoding="utf-8")


def test_kinds_are_not_mixed(in_tmp: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(run_dir), ELYZA]) == 2
    assert "cannot be mixed" in capsys.readouterr().err
    assert not Path("advice.html").exists()
