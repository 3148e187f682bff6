"""The command line: one file per verb. Nothing here imports torch; a verb that needs it imports it when called."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from kitaeru.errors import KitaeruError, UsageError
from kitaeru.i18n import LANGUAGES, set_language, tr


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`argv` without the program's name; default: this process's) and return the exit code.

    0: done; 1: could not be done; 2: the request was wrong; 130: interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = False
    try:
        words, debug = _take_flag(words, "--debug")
        words, chosen = _take_language(words)
        if chosen is not None:
            set_language(chosen)
        return _dispatch(words)
    except KitaeruError as error:
        if debug:
            traceback.print_exc()
        return _complain(error)
    except KeyboardInterrupt:
        print(tr("Interrupted."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _unexpected(error, debug=debug)


def _dispatch(words: list[str]) -> int:
    from cyclopts import CycloptsError

    from kitaeru.cli.text import console
    from kitaeru.cli.verbs import build, called

    # It warns while it is imported, of kernels that only inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    out = console()
    try:
        result = build()(
            words,
            console=out,
            error_console=console(stderr=True),
            print_error=False,
            exit_on_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        from kitaeru.cli.mistakes import usage_error

        raise usage_error(error, *called(words)) from error
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _before_dashes(words: list[str]) -> int:
    """How many words stand before a lone `--`, after which nothing is an option."""
    return words.index("--") if "--" in words else len(words)


def _take_flag(words: list[str], flag: str) -> tuple[list[str], bool]:
    end = _before_dashes(words)
    return [word for i, word in enumerate(words) if i >= end or word != flag], flag in words[:end]


def _take_language(words: list[str]) -> tuple[list[str], str | None]:
    """Take `--lang X` or `--lang=X` out of the words, wherever it stands; the last one counts."""
    rest: list[str] = []
    chosen: str | None = None
    end = _before_dashes(words)
    options = iter(words[:end])
    for word in options:
        if word != "--lang" and not word.startswith("--lang="):
            rest.append(word)
            continue
        chosen = word.partition("=")[2] if "=" in word else next(options, "")
        if chosen not in LANGUAGES:
            raise UsageError(
                tr("`--lang` knows no language “{code}”.", code=chosen) if chosen else tr("`--lang` needs a value."),
                remedy=tr("Languages: {codes}.", codes=", ".join(LANGUAGES)),
            )
    return rest + words[end:], chosen


def _complain(error: KitaeruError) -> int:
    from kitaeru.cli.text import print_error

    print_error(error)
    return error.exit_code


def _unexpected(error: Exception, *, debug: bool) -> int:
    """A fault in kitaeru: one line and where the details are, not a screen of code."""
    if debug:
        traceback.print_exception(error)
        return 1
    detail = f"{type(error).__name__}: {error}".splitlines()[0]
    with tempfile.NamedTemporaryFile(
        "w", prefix="kitaeru-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return _complain(
        KitaeruError(
            tr("Something went wrong that kitaeru did not expect: {detail}", detail=detail),
            remedy=tr("The details are in {path}; `--debug` shows them here.", path=Path(file.name)),
        )
    )
