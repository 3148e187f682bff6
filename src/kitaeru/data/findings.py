"""What can be wrong with Japanese text, one detector each: mojibake, widths, normal forms, control characters."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kitaeru.data.types import Row
from kitaeru.i18n import N_, tr

Level = Literal["note", "warning", "error"]
PLACES = 3
_AROUND = 8


@dataclass(frozen=True)
class Finding:
    """Something a person should know about the data.

    `name` is for programs; `rows` is how many rows have it; `places` are the first of them (file:row); `sample` is what
    it looks like; `what` and `remedy` are translated. An "error" would stop a run.
    """

    name: str
    level: Level
    rows: int
    places: tuple[str, ...]
    sample: str
    what: str
    remedy: str


@dataclass
class Tally:
    """Rows with one finding, while they are being counted."""

    rows: int = 0
    places: list[str] = field(default_factory=list)
    sample: str = ""

    def add(self, place: object, sample: str = "") -> None:
        """Count one row at `place`."""
        self.rows += 1
        if len(self.places) < PLACES:
            self.places.append(str(place))
            self.sample = self.sample or sample

    def finding(self, name: str, level: Level, what: str, remedy: str) -> Finding:
        """The finding with its translated texts."""
        return Finding(name, level, self.rows, tuple(self.places), self.sample, what, remedy)


# UTF-8 read as CP932: kana become 縺, 繧, 繝 and one or two characters; text without kana is rare. 縺れつ縺れつ is good
# Japanese, so what is found must also turn back into kana.
_AS_CP932 = re.compile(r"[縺繧繝].{0,2}[縺繧繝]")
# UTF-8 read as Latin-1 or CP1252: a first byte E2–E9 and two continuation bytes, again and again.
_TAIL = (
    "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
    "\u2013-\u2026\u2030\u2039\u203a\u20ac\u2122"
)
_AS_LATIN = re.compile(f"(?:[â-é][{_TAIL}]{{1,2}}){{2,}}")
# EUC-JP, or CP932, read as Latin-1.
_AS_LATIN_EUC = re.compile(r"(?:[¤¥][¡-þ]){3,}|(?:[\u0082\u0083][\u0040-\u00fc]){2,}")
_REPLACEMENT = re.compile("\ufffd")
_HALF_KATAKANA = re.compile("[\uff66-\uff9f]+")
_FULL_ASCII = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]+")
_LOOSE_DAKUTEN = re.compile("[\u3040-\u30ff][\u3099\u309a]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060\ufeff]")
# Compatibility characters that Japanese prose is full of, or that have a finding of their own.
_USUAL_COMPATIBILITY = re.compile("[\uff00-\uffef\u3000\u2025\u2026\u00a0\u309b\u309c\u3099\u309a]")


def _found(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def find(text: str) -> str | None:
        match = pattern.search(text)
        return _around(text, match.start(), match.end()) if match else None

    return find


def _around(text: str, start: int, end: int) -> str:
    cut = text[max(0, start - _AROUND) : min(end, start + 2 * _AROUND) + _AROUND]
    return "".join(
        f"<U+{ord(c):04X}>" if _CONTROL.match(c) or c in "\r\u3099\u309a" else c for c in cut.replace("\n", " ")
    )


def _mojibake(text: str) -> str | None:
    for match in _AS_CP932.finditer(text):
        if _turns_back(text[match.start() : match.start() + 2 * _AROUND]):
            return _around(text, match.start(), match.end())
    for pattern in (_AS_LATIN, _AS_LATIN_EUC):
        found = pattern.search(text)
        if found:
            return _around(text, found.start(), found.end())
    return None


def _turns_back(text: str) -> bool:
    """Whether `text`, written as CP932 and read as UTF-8, is mostly kana."""
    back = text.encode("cp932", "ignore").decode("utf-8", "replace")
    kana = sum("\u3040" <= character <= "\u30ff" for character in back)
    return kana >= 2 and kana > back.count("\ufffd")


def _not_nfc(text: str) -> str | None:
    if unicodedata.is_normalized("NFC", text) or _LOOSE_DAKUTEN.search(text):
        return None
    changed = [c for c in dict.fromkeys(text) if unicodedata.normalize("NFC", c) != c]
    return " ".join(changed[:_AROUND]) or "…"


def _compatibility(text: str) -> str | None:
    if unicodedata.is_normalized("NFKC", text):
        return None
    rest = _USUAL_COMPATIBILITY.sub("", "".join(dict.fromkeys(text)))
    changed = [c for c in rest if unicodedata.normalize("NFKC", c) != unicodedata.normalize("NFC", c)]
    return " ".join(changed[:_AROUND]) or None


@dataclass(frozen=True)
class TextCheck:
    """A detector: `find` gives a sample of what it found in a text, or None."""

    name: str
    level: Level
    find: Callable[[str], str | None]
    what: str
    remedy: str


TEXT_CHECKS = (
    TextCheck(
        "mojibake",
        "warning",
        _mojibake,
        N_("Mojibake: text that was read in the wrong encoding."),
        N_("Make the file again from its source with the right encoding; the text cannot be trained as it is."),
    ),
    TextCheck(
        "replacement_character",
        "warning",
        _found(_REPLACEMENT),
        N_("The replacement character � stands where bytes were lost."),
        N_("Make the file again from its source; what was lost cannot be brought back from here."),
    ),
    TextCheck(
        "control_character",
        "warning",
        _found(_CONTROL),
        N_("Invisible control characters."),
        N_("Remove them, unless the model should learn to write them."),
    ),
    TextCheck(
        "loose_dakuten",
        "warning",
        _found(_LOOSE_DAKUTEN),
        N_("Dakuten as characters of their own (NFD, as macOS file names have): か+゛ instead of が."),
        N_('Normalise: unicodedata.normalize("NFC", text) in Python. Otherwise such words are other tokens.'),
    ),
    TextCheck(
        "not_nfc",
        "note",
        _not_nfc,
        N_("Text that is not in the normal form NFC (compatibility kanji, loose accents)."),
        N_("Usually harmless. Normalise to NFC if names need not be kept in their exact form."),
    ),
    TextCheck(
        "half_width_katakana",
        "warning",
        _found(_HALF_KATAKANA),
        N_("Half-width katakana (ｶﾀｶﾅ)."),
        N_('Normalise: unicodedata.normalize("NFKC", text) in Python, unless the model should write them.'),
    ),
    TextCheck(
        "full_width_ascii",
        "note",
        _found(_FULL_ASCII),
        N_("Full-width letters or digits (ＡＢＣ１２３)."),
        N_("Fine if meant. The model learns to mix widths if the data does."),
    ),
    TextCheck(
        "compatibility_character",
        "note",
        _compatibility,
        N_("Compatibility characters that NFKC would replace (①, ㈱, ㌔, ﬁ)."),
        N_("Fine if meant. NFKC turns them into plain characters."),
    ),
)


def texts_of(row: Row) -> Iterator[str]:
    """The texts of a row that a person wrote: its text, or the content of its turns."""
    if row.text is not None:
        yield row.text
    for message in row.messages:
        yield message["content"]


def text_findings(rows: Sequence[Row]) -> list[Finding]:
    """What the detectors found, in the order of the table."""
    tallies = {check.name: Tally() for check in TEXT_CHECKS}
    for row in rows:
        text = "\n".join(texts_of(row))
        if text.isascii() and text.isprintable():
            continue
        for check in TEXT_CHECKS:
            sample = check.find(text)
            if sample is not None:
                tallies[check.name].add(row.origin, sample)
    return [
        tallies[check.name].finding(check.name, check.level, tr(check.what), tr(check.remedy))
        for check in TEXT_CHECKS
        if tallies[check.name].rows
    ]


def duplicate_findings(rows: Sequence[Row]) -> list[Finding]:
    """Rows that say exactly the same, and questions (near enough the same) with different answers."""
    same, answers = Tally(), Tally()
    seen: dict[bytes, Row] = {}
    asked: dict[bytes, Row] = {}
    for row in rows:
        first = seen.setdefault(_digest(row.text, row.trained_from, row.messages, row.tools), row)
        if first is not row:
            same.add(f"{row.origin} = {first.origin}", _start(row))
            continue
        question = _question(row)
        if question is None:
            continue
        first = asked.setdefault(question, row)
        if first is not row:
            answers.add(f"{row.origin} ≈ {first.origin}", _start(row))
    found = []
    if same.rows:
        what = tr("Rows that are exact copies of an earlier row.")
        remedy = tr("Remove them: copies are learnt by heart, and in validation data they hide it.")
        found.append(same.finding("duplicate", "warning", what, remedy))
    if answers.rows:
        what = tr("The same question again (widths and spaces aside) with another answer.")
        remedy = tr("Fine if meant; otherwise keep the better answer.")
        found.append(answers.finding("same_question", "note", what, remedy))
    return found


def _digest(*values: object) -> bytes:
    content = json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).digest()


def _question(row: Row) -> bytes | None:
    """Everything before the last answer, widths and spaces aside."""
    if row.text is not None:
        return _digest(_plain([row.text[: row.trained_from]])) if row.trained_from else None
    last = max((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), default=0)
    before = row.messages[:last]
    if not any(message["role"] == "user" for message in before):
        return None
    return _digest([message["role"] for message in before], _plain(message["content"] for message in before))


def _plain(texts: Iterable[str]) -> str:
    return "\n".join("".join(unicodedata.normalize("NFKC", text).lower().split()) for text in texts)


def _start(row: Row) -> str:
    spoken = [message["content"] for message in row.messages if message["role"] == "user"]
    text = " ".join(((spoken or list(texts_of(row)))[0]).split())
    return text[:24] + ("…" if len(text) > 24 else "")
