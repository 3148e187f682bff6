"""Texts in two languages, and the script that keeps the catalogue."""

from __future__ import annotations

import gettext
import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest

from kitaeru import i18n

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "scripts" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    import sys

    module = sys.modules["catalogue"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text('tr("Hello {name}", name=1)\nN_("Two " "parts")\ntr("")\n')
    (tmp_path / "b.py").write_text('i18n.tr("Hello {name}", name=x)\ntr(LATER)\ntr(field.description)\n')
    return tmp_path


def translate(source: Path, english: str, japanese: str) -> None:
    path = source / "locale/ja/LC_MESSAGES/kitaeru.po"
    text = path.read_text(encoding="utf-8")
    head, found, tail = text.partition(f'msgid "{english}"\nmsgstr "')
    assert found
    path.write_text(head + found + japanese + tail[tail.index('"') :], encoding="utf-8")


def po(source: Path) -> Path:
    return source / "locale/ja/LC_MESSAGES/kitaeru.po"


def update(catalogue: ModuleType, source: Path) -> None:
    catalogue.write_catalogue(po(source), catalogue.extract(source))
    po(source).with_suffix(".mo").write_bytes(catalogue.compiled(catalogue.read_translations(po(source))))


def test_extract(catalogue: ModuleType, source: Path) -> None:
    texts = catalogue.extract(source)
    assert texts.files == {"Hello {name}": ["a.py", "b.py"], "Two parts": ["a.py"]}
    assert texts.problems == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ('tr(f"x {y}")', "needs a literal text"),
        ('tr("x" + y)', "needs a literal text"),
        ('tr("x".format(y))', "needs a literal text"),
        ("tr()", "needs a literal text"),
        ("N_(x)", "needs a literal text"),
        ('tr("{a}", b=1)', "has the places ['a'], the call gives ['b']"),
        ('tr("a {b", b=1)', "cannot be formatted"),
    ],
)
def test_what_cannot_be_translated(catalogue: ModuleType, source: Path, code: str, problem: str) -> None:
    (source / "c.py").write_text(f"\n{code}\n")
    (found,) = catalogue.extract(source).problems
    assert found.startswith("c.py:2: ")
    assert problem in found


def test_check_until_all_is_well(catalogue: ModuleType, source: Path) -> None:
    assert any("not in kitaeru.po" in line for line in catalogue.check(source))
    update(catalogue, source)
    assert catalogue.check(source) == ["not translated: 'Hello {name}'", "not translated: 'Two parts'"]
    translate(source, "Hello {name}", "こんにちは{nane}")
    translate(source, "Two parts", "二つ")
    assert catalogue.check(source) == [
        "other {places} than its English: 'こんにちは{nane}'",
        "kitaeru.mo is stale (run `make i18n`)",
    ]
    translate(source, "Hello {name}", "こんにちは{name}")
    update(catalogue, source)
    assert catalogue.check(source) == []


def test_translations_are_kept_and_dead_ones_dropped(catalogue: ModuleType, source: Path) -> None:
    update(catalogue, source)
    translate(source, "Hello {name}", "こんにちは{name}")
    translate(source, "Two parts", "二つ")
    (source / "a.py").write_text('tr("Hello {name}", name=1)\ntr("New")\n')
    assert any("no longer in the code" in line for line in catalogue.check(source))
    update(catalogue, source)
    assert catalogue.read_translations(po(source)) == {"Hello {name}": "こんにちは{name}", "New": ""}


def test_files_are_the_same_every_time(catalogue: ModuleType, source: Path) -> None:
    update(catalogue, source)
    translate(source, "Two parts", "二つ")
    update(catalogue, source)
    first = po(source).read_bytes(), po(source).with_suffix(".mo").read_bytes()
    (source / "b.py").write_text("# a line\n" + (source / "b.py").read_text())
    update(catalogue, source)
    assert (po(source).read_bytes(), po(source).with_suffix(".mo").read_bytes()) == first


def test_gettext_reads_what_is_compiled(catalogue: ModuleType) -> None:
    texts = {"b": "ビー", "a": "エー", "open": "", "long " * 50: "長い" * 50}
    read = gettext.GNUTranslations(io.BytesIO(catalogue.compiled(texts)))
    assert {text: read.gettext(text) for text in texts} == {**texts, "open": "open"}
    assert read.charset() == "UTF-8"


def test_the_code_has_no_text_that_cannot_be_translated(catalogue: ModuleType) -> None:
    assert catalogue.extract(catalogue.SOURCE).problems == []


# i18n itself


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "ja_JP"}, "ja"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
    ],
)
def test_language_of_the_locale(environment: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    i18n.set_language(None)
    assert i18n.language() == language
    i18n.set_language("en")
    assert i18n.language() == "en"


def test_tr() -> None:
    assert i18n.tr("{a} of {b}", a=1, b="{c}") == "1 of {c}"
    assert i18n.tr("{left as it is}") == "{left as it is}"
    assert i18n.tr("") == ""
    assert i18n.N_("x") == "x"
    with pytest.raises(ValueError, match="unknown language 'fr'"):
        i18n.set_language("fr")
