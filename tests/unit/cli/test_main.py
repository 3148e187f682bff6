"""The frame of the command line: languages, help, mistakes, exit codes, and how fast it starts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from kitaeru import cli, i18n
from kitaeru.cli import main, verbs
from kitaeru.errors import TrainingError


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kitaeru", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
        check=False,
        stdin=subprocess.DEVNULL,
    )


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def all_verbs() -> list[verbs.Verb]:
    return [leaf for verb in verbs.VERBS for leaf in (verb.inside or (verb,))]


def test_every_verb_exists() -> None:
    for verb in all_verbs():
        module, _, name = verb.target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    "words", [["--help"], ["recipe", "explain", "train.seed"], ["recipe", "schema"], ["train", "--help"]]
)
def test_starts_fast_and_without_torch(
    words: list[str], times_its_libraries: Callable[[list[str], float], float]
) -> None:
    assert times_its_libraries(words, 3.0) < 3.0


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize(
    "words", [[], ["--help"], ["train", "--help"], ["recipe"], ["recipe", "show", "-h"], ["data", "check", "--help"]]
)
def test_help_holds_in_80_columns(
    language: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--lang", language, *words]) == 0
    out = capsys.readouterr().out
    assert "kitaeru" in out
    assert max(map(width, out.splitlines())) <= 80
    assert "kitaeru " + " ".join(word for word in words if word[0] != "-") in out


def test_help_lists_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    for verb in verbs.VERBS:
        assert verb.help[:20] in out
    for verb in all_verbs():
        assert verb.example.startswith("kitaeru ")


@pytest.mark.parametrize(
    ("words", "line", "remedy"),
    [
        (["trian"], "`kitaeru` has no command `trian`.", "Did you mean `kitaeru train`?"),
        (["zzz"], "`kitaeru` has no command `zzz`.", f"Commands: {', '.join(verb.name for verb in verbs.VERBS)}."),
        (["recipe", "shw"], "`kitaeru recipe` has no command `shw`.", "Did you mean `kitaeru recipe show`?"),
        (["recipe", "show"], "`kitaeru recipe show` needs RECIPE.", "See `kitaeru recipe show --help`."),
        (["recipe", "show", "x", "--jsn"], "`kitaeru recipe show` has no option `--jsn`.", "Did you mean `--json`?"),
        (
            ["recipe", "show", "x", "--zz=3"],
            "`kitaeru recipe show` has no option `--zz`.",
            "See `kitaeru recipe show --help`.",
        ),
        (
            ["recipe", "show", "x", "y"],
            "`kitaeru recipe show` does not know what to do with: y",
            "See `kitaeru recipe show --help`.",
        ),
        (["recipe", "show", "x", "--set"], "`--set` needs a value.", "See `kitaeru recipe show --help`."),
        (
            ["chat", "x", "--max-new-tokens", "many"],
            '"many" is not a value for --max-new-tokens.',
            "It must be a number.",
        ),
        (["chat", "x", "--quantize", "int9"], '"int9" is not a value for --quantize.', "Did you mean `int8`?"),
        (["chat", "x", "--system", "a", "--system", "b"], "--system is given twice.", "See `kitaeru chat --help`."),
        (["--lang", "fr"], "`--lang` knows no language “fr”.", "Languages: en, ja."),
        (["recipe", "--lang"], "`--lang` needs a value.", "Languages: en, ja."),
    ],
)
def test_mistakes(words: list[str], line: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [line, f"  → {remedy}"]
    assert captured.out == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--lang", "ja", "recipe", "presets"],
        ["recipe", "presets", "--lang=ja"],
        ["recipe", "--lang=en", "presets", "--lang", "ja"],
    ],
)
def test_language_stands_before_or_after_the_verb(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("kitaeru.cli.recipe.presets", lambda: seen.append(i18n.language()))
    assert main(words) == 0
    assert seen == ["ja"]


def test_what_follows_two_dashes_is_no_option() -> None:
    assert cli._take_language(["a", "--", "--lang", "ja"]) == (["a", "--", "--lang", "ja"], None)
    assert cli._take_flag(["a", "--", "--debug"], "--debug") == (["a", "--", "--debug"], False)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def presets() -> None:
        raise error

    monkeypatch.setattr("kitaeru.cli.recipe.presets", presets)


def test_an_error_for_a_person(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, TrainingError("It stopped.", where="step 3", remedy="Go on."))
    assert main(["recipe", "presets"]) == 1
    assert capsys.readouterr().err == "step 3: It stopped.\n  → Go on.\n"
    assert main(["recipe", "presets", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["recipe", "presets"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, ZeroDivisionError("division [by] zero"))
    assert main(["recipe", "presets"]) == 1
    err = capsys.readouterr().err
    (details,) = tmp_path.iterdir()
    assert "Traceback" not in err
    assert "ZeroDivisionError: division [by] zero" in err
    assert str(details) in err
    assert "Traceback" in details.read_text()
    assert main(["--debug", "recipe", "presets"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [details]


def test_a_closed_pipe_is_no_fault() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m kitaeru recipe schema | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (len(done.stdout), done.stderr) == (10, "")


def test_version_and_module() -> None:
    from kitaeru import __version__

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"kitaeru {__version__}\n")
    assert run("trian").returncode == 2
