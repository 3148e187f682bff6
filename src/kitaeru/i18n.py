"""Texts for people, in English and Japanese.

English is written in the code and is the message id; `locale/ja/LC_MESSAGES/kitaeru.mo` holds the Japanese.
`tr` translates now, `N_` marks a text that is translated later (a field's documentation, a table of rules).
"""

from __future__ import annotations

import gettext
import locale
import os
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "ja")
_current: str | None = None


def N_(message: str) -> str:  # noqa: N802 - gettext's own name
    """Mark `message` for the catalogue without translating it yet."""
    return message


def language() -> str:
    """The language in force: what `set_language` was told, else the locale's, else English."""
    return _current or _from_locale()


def set_language(code: str | None) -> None:
    """Use `code` ("en" or "ja") from now on; None returns to the locale's language."""
    if code is not None and code not in LANGUAGES:
        raise ValueError(f"unknown language {code!r}; known: {', '.join(LANGUAGES)}")
    global _current
    _current = code


def tr(message: str, **values: object) -> str:
    """`message` in the language in force, with `{name}` places filled from `values` by `str.format`."""
    text = _catalogue(language()).gettext(message) if message else message
    return text.format(**values) if values else text


def in_every_language(message: str) -> frozenset[str]:
    """`message` as it may stand in a file that a run in either language wrote."""
    return frozenset(_catalogue(code).gettext(message) for code in LANGUAGES)


def _from_locale() -> str:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name)
        if value:
            return "ja" if value.startswith("ja") else "en"
    return "ja" if (locale.getlocale()[0] or "").startswith("ja") else "en"


@cache
def _catalogue(code: str) -> gettext.NullTranslations:
    if code == "en":
        return gettext.NullTranslations()
    return gettext.translation("kitaeru", Path(__file__).parent / "locale", [code], fallback=True)
