"""Every page of the command line in a language of wide letters: nothing stays English, nothing passes 80 columns.

The translation is made up: each English word becomes as many columns of kana; {places} stay.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from kitaeru import i18n
from kitaeru.cli import main
from kitaeru.cli.verbs import VERBS
from kitaeru.recipe.fields import table


def kana(text: str) -> str:
    return re.sub(r"(\{[^}]*\}|`[^`]*`)|[A-Za-z]+", lambda m: m[1] or "あ" * (len(m[0]) // 2 + 1), text)


class Kana:
    """A catalogue that knows every text."""

    def gettext(self, message: str) -> str:
        return kana(message)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "_catalogue", lambda code: Kana())
    monkeypatch.setenv("COLUMNS", "80")


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    captured = capsys.readouterr()
    out = captured.err if code else captured.out
    assert "あ" in out
    return out


PAGES = [[], *([v.name] for v in VERBS if v.inside), *([v.name] for v in VERBS if not v.inside)]
PAGES += [[v.name, inner.name] for v in VERBS for inner in v.inside]


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *words, "--help")
    assert max(map(width, out.splitlines())) <= 80
    left = set(re.findall(r"\b(?:Usage|Commands|Options|Arguments|Example|default|choices|required|Show|the)\b", out))
    assert not left


def test_explain_and_show(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    for path in ("", *table()):
        out = printed(capsys, "recipe", "explain", *([path] if path else []))
        assert max(map(width, out.splitlines())) <= 80, path
        assert not re.search(r"\b(?:type|example|the|is)\b(?![:`{},])", out.replace(path, "")), out
    Path("r.yaml").write_text("model: bundled\ndata: {train: a}\npreset: quick\n")
    out = printed(capsys, "recipe", "show", "r.yaml")
    assert max(map(width, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "words",
    [["trian"], ["recipe", "show"], ["recipe", "show", "x", "--jsn"], ["recipe", "show", "x", "y"], ["--lang", "x"]],
)
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *words, code=2)
    assert not re.search(r"\b(?:has|no|needs|mean|know|See|Commands)\b", out), out


def test_recipe_mistakes(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    Path("r.yaml").write_text("modell: x\ntrain: {seed: 1.5, on_nan: stp}\nlora: {dora: no}\nmethod: full\n")
    out = printed(capsys, "recipe", "show", "r.yaml", code=2)
    assert len(out.splitlines()) == 13
    assert not re.search(r"\b(?:unknown|key|not|whole|number|text|Write|Did|recipe)\b", out.replace("r.yaml", "")), out
