from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.cli import report as verb
from kitaeru.errors import UsageError
from kitaeru.i18n import set_language
from kitaeru.report.chart import Chart, Series, figure
from kitaeru.report.history import History
from kitaeru.report.page import page, write_page
from kitaeru.report.wording import loss_text

Make = Callable[..., Path]
VOID = {"meta", "link", "br", "path", "img", "input", "hr"}


class Outline(HTMLParser):
    """Checks that every element is closed in order, and gathers text, tags and attributes."""

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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made_page(folder: Path) -> tuple[str, Outline]:
    path = write_page(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Outline(html)


def test_a_finished_run_has_every_section(run_dir: Path) -> None:
    _, outline = made_page(run_dir)
    text = outline.text
    for title in ("Curves", "The same questions", "Data", "Plan", "Notices", "Checkpoints", "Environment", "Recipe"):
        assert title in text
    past = History.load(run_dir)
    assert "3.450 → 1.977" in text
    assert "-42.7 %" in text
    assert "60 / 60" in text
    assert f"{past.tokens:,}" in text
    assert "predicted 356 MB, off by +4.1 %" in text
    assert "富士山です" in text
    assert "A CPU computes bf16 slower than fp32." in text
    assert "checkpoints/step-000048" in text
    assert "torch 2.13.0" in text
    assert "the optimizer's moments" in text
    assert "instructions.jsonl training alpaca 1" in text  # the form that was found, not "auto"
    assert "≤ 64 1,403" in text
    assert outline.tags.count("svg") == 5


def test_the_recipe_is_there_to_the_letter(run_dir: Path) -> None:
    html, _ = made_page(run_dir)
    found = re.search(r"<pre>(.*?)</pre>", html, re.DOTALL)
    assert found is not None
    outline = Outline(found[0])
    assert "".join(outline.words) == (run_dir / "recipe.yaml").read_text(encoding="utf-8")


def test_nothing_comes_from_the_network(run_dir: Path) -> None:
    html, outline = made_page(run_dir)
    assert "http:" not in html.replace("http://www.w3.org", "")
    assert "https:" not in html
    assert not {"iframe", "object", "embed", "base", "form"} & set(outline.tags)
    sources = [value for name, value in outline.attributes if name in ("src", "href", "srcset", "action")]
    assert sources == ["data:,"]
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_text_from_data_is_escaped(run_dir: Path) -> None:
    html, outline = made_page(run_dir)
    # The page's own script and nothing else.
    assert outline.tags.count("script") == 1
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
    # Five <b> belong to the titles of the five charts; the sample's <b> is text.
    assert outline.tags.count("b") == 5


@given(st.text(min_size=1))
def test_any_text_survives(text: str) -> None:
    from kitaeru.events import Notice, RunStarted, Sample

    text = text.replace("\r", " ")
    events = (
        RunStarted(
            run=text, model=text, method="lora", strategy=text, device=text, max_steps=3, environment={text: text}
        ),
        Sample(step=0, prompt=text, answer=text),
        Notice(level="warning", text=text, examples=(text,)),
    )
    outline = Outline(page(History(events), None, text, Path("x")))
    assert " ".join(text.split()) in outline.text


@pytest.mark.parametrize("name", ["resumed", "killed", "begun"])
def test_runs_that_did_not_go_straight(make: Make, name: str) -> None:
    html, outline = made_page(make(name))
    assert "99.0" not in outline.text
    if name == "resumed":
        assert "resumed after step 36" in outline.text
        assert "60 / 60" in outline.text
    else:
        assert "going, or killed" in outline.text
        assert ("25 / 60" in outline.text) == (name == "killed")
    assert "NaN" not in html.split("<script>")[0]


def test_numbers_that_are_not_finite_leave_gaps(made: ModuleType, tmp_path: Path) -> None:
    steps = [made.step(n, 9, loss=math.nan if n in (1, 4) else math.inf if n == 5 else 2.0) for n in range(1, 10)]
    html, outline = made_page(made.write(tmp_path / "x", 9, [[made.started(9), *steps]]))
    assert not re.search(r"nan|inf", " ".join(value for name, value in outline.attributes if name in ("d", "style")))
    assert "Training loss, first and last" in outline.text
    assert "<svg" in html


@pytest.mark.parametrize(("code", "lang"), [("en", "en"), ("ja", "ja")])
def test_the_page_says_its_language(run_dir: Path, code: str, lang: str) -> None:
    set_language(code)
    html, _ = made_page(run_dir)
    assert f'<html lang="{lang}">' in html
    # Japanese text in an English page says what it is, for the right shapes of characters.
    assert re.search(r'class="q" lang="ja">日本で', html)


def test_a_plan_of_another_version_is_left_out(run_dir: Path) -> None:
    (run_dir / "plan.json").write_text('{"version": 999}', encoding="utf-8")
    _, outline = made_page(run_dir)
    assert "Predicted memory" not in outline.text
    assert "3.450 → 1.977" in outline.text


def test_a_long_run_makes_a_page_of_bearable_size(made: ModuleType, tmp_path: Path) -> None:
    folder = made.finished(tmp_path / "long", 20_000)
    assert write_page(folder).stat().st_size < 400_000


def test_counts_left_out_of_both_splits_are_added(made: ModuleType, tmp_path: Path) -> None:
    from dataclasses import replace

    train, valid = (replace(event, left_out={"too long": 7}) for event in made.data())
    _, outline = made_page(made.write(tmp_path / "x", 9, [[made.started(9), train, valid]]))
    assert "too long 14" in outline.text


def test_chart_labels_and_hover_data_agree() -> None:
    points = [(n, 3.0 - n / 10) for n in range(1, 11)]
    html = figure(Chart("Loss <x>", [Series("training", points)], loss_text, "step", marks=[(10, 2.0, "best 2.000")]))
    outline = Outline(html)
    data = json.loads(next(value for name, value in outline.attributes if name == "data-chart"))
    (curve,) = data["curves"]
    assert curve["step"] == list(range(1, 11))
    assert curve["text"][-1] == "2.000"
    assert curve["at"][0] == 0.0
    assert curve["at"][-1] == 1.0
    assert "best 2.000" in outline.text
    assert "Loss <x>" in outline.text
    assert figure(Chart("Loss", [Series("training", [(1, math.nan)])], loss_text, "step")) == ""


def test_the_verb_prints_the_path(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.run(run_dir) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


def test_the_verb_answers_programs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.run(run_dir, json_=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(run_dir / "report.html")
    assert answer["steps"] == answer["max_steps"] == 60
    assert answer["validation_loss"]["before"] == pytest.approx(3.45)
    assert answer["validation_loss"]["best_step"] == 60


def test_the_verb_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verb.run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kitaeru.cli import main

    assert main(["report", str(run_dir), "--no-open", "--json", "--lang", "ja"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "finished"
    assert '<html lang="ja">' in (run_dir / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(run_dir / "nowhere"), "--lang", "en"]) == 2
    assert "events.jsonl" in capsys.readouterr().err
