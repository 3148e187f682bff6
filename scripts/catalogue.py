"""The Japanese catalogue: collect the texts from the code, compile them, and check that nothing is missing.

    python scripts/catalogue.py extract   merge the texts of src/kitaeru into kitaeru.po
    python scripts/catalogue.py compile   kitaeru.po to kitaeru.mo
    python scripts/catalogue.py update    both
    python scripts/catalogue.py check     exit code 1, with a list, if the code, .po and .mo do not agree
    python scripts/catalogue.py missing   print the texts that have no translation yet, for a translator

A text is the first argument of `tr` or `N_`. Both files come out the same whoever writes them: no dates, no lines.
"""

from __future__ import annotations

import ast
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

SOURCE = Path(__file__).resolve().parents[1] / "src" / "kitaeru"
FOLDER = Path("locale") / "ja" / "LC_MESSAGES"
HEADER = (
    "Project-Id-Version: kitaeru\n"
    "Language: ja\n"
    "Content-Type: text/plain; charset=UTF-8\n"
    "Content-Transfer-Encoding: 8bit\n"
)


@dataclass
class Texts:
    """Every text with the files it stands in, in order, and the calls that cannot be translated."""

    files: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def extract(source: Path) -> Texts:
    """Collect the texts of all Python files below `source`."""
    texts = Texts()
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
            if name != "i18n.py":
                _take(call, name, texts)
    return texts


def _calls(tree: ast.AST) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _function(node) in ("tr", "N_")]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def _function(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _take(call: ast.Call, name: str, texts: Texts) -> None:
    place, function = f"{name}:{call.lineno}", _function(call)
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        if first.value:
            files = texts.files.setdefault(first.value, [])
            if name not in files:
                files.append(name)
        texts.problems += [f"{place}: {what}" for what in _wrong_places(call, first.value)]
    elif function == "N_" or not isinstance(first, ast.Name | ast.Attribute | ast.Subscript):
        texts.problems.append(
            f"{place}: {function}() needs a literal text (or, for tr, the name of one marked with N_)"
        )


def _wrong_places(call: ast.Call, text: str) -> Iterator[str]:
    """Whether the {places} of the text are the keywords of the call."""
    given = {keyword.arg for keyword in call.keywords}
    if None in given or not given:  # **values; or a text that is not formatted
        return
    names = places(text)
    if names is None:
        yield f"{text!r} cannot be formatted: write {{{{ and }}}} for braces"
    elif names != given:
        yield f"{text!r} has the places {sorted(names)}, the call gives {sorted(map(str, given))}"


def places(text: str) -> set[str] | None:
    """The names of the {places} in a text; None if its braces do not parse."""
    try:
        return {name.split(".")[0].split("[")[0] for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError:
        return None


def read_translations(path: Path) -> dict[str, str]:
    """The translations of a .po file; "" where there is none yet."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        catalogue = read_po(file, locale="ja")
    return {str(m.id): str(m.string or "") for m in catalogue if m.id and not m.fuzzy}


def write_catalogue(path: Path, texts: Texts) -> int:
    """Write the .po with every text of the code, keeping translations and dropping dead ones; returns how many."""
    known = read_translations(path)
    catalogue = Catalog(locale="ja", charset="utf-8")
    for text, files in texts.files.items():
        catalogue.add(text, known.get(text, ""), locations=[(name, 0) for name in files])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        lines = "".join(f'"{line}\\n"\n' for line in HEADER.splitlines())
        file.write(f'msgid ""\nmsgstr ""\n{lines}\n'.encode())
        write_po(file, catalogue, width=110, omit_header=True, include_lineno=False)
    return len(set(known) - set(texts.files))


def compiled(translations: dict[str, str]) -> bytes:
    """A GNU .mo file: a header, two tables of (length, offset) sorted by id, then the texts."""
    entries = sorted((k.encode(), v.encode()) for k, v in {**translations, "": HEADER}.items() if v)
    keys = b"".join(key + b"\0" for key, _ in entries)
    start = 7 * 4 + 16 * len(entries)
    offset, tables, pools = start, [], (0, 1)
    for column in pools:
        table = b""
        for entry in entries:
            table += struct.pack("<II", len(entry[column]), offset)
            offset += len(entry[column]) + 1
        tables.append(table)
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + tables[0] + tables[1] + keys + b"".join(value + b"\0" for _, value in entries)


def check(source: Path) -> list[str]:
    """Everything in which the code, the .po and the .mo do not agree."""
    texts, po = extract(source), source / FOLDER / "kitaeru.po"
    known = read_translations(po)
    problems = list(texts.problems)
    problems += [f"not in kitaeru.po (run `make i18n`): {text!r}" for text in texts.files if text not in known]
    problems += [f"no longer in the code (run `make i18n`): {text!r}" for text in known if text not in texts.files]
    problems += [f"not translated: {text!r}" for text, japanese in known.items() if not japanese]
    for text, japanese in known.items():
        if japanese and places(text) is not None and places(text) != places(japanese):
            problems.append(f"other {{places}} than its English: {japanese!r}")
    mo = po.with_suffix(".mo")
    if not mo.exists() or mo.read_bytes() != compiled(known):
        problems.append("kitaeru.mo is stale (run `make i18n`)")
    return problems


def main(arguments: list[str]) -> int:
    """Run one command on src/kitaeru."""
    command = arguments[0] if len(arguments) == 1 else ""
    po = SOURCE / FOLDER / "kitaeru.po"
    if command in ("extract", "update"):
        texts = extract(SOURCE)
        dropped = write_catalogue(po, texts)
        print(f"{len(texts.files)} texts, {dropped} dead ones dropped")
    if command in ("compile", "update"):
        po.with_suffix(".mo").write_bytes(compiled(read_translations(po)))
    if command in ("update", "extract", "compile"):
        return 0
    if command == "missing":
        known = read_translations(po)
        for text in extract(SOURCE).files:
            if not known.get(text):
                print(repr(text))
        return 0
    if command == "check":
        problems = check(SOURCE)
        print("\n".join(problems) or "the catalogue is complete", file=sys.stderr if problems else sys.stdout)
        return 1 if problems else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
