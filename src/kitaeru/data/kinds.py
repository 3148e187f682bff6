"""The forms of rows people have, how they are recognised, and how each becomes a `Row`."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kitaeru.data.turns import BadRow, Turns, read_turns, type_name, whole
from kitaeru.data.types import Origin, Row
from kitaeru.i18n import N_, tr

OPENAI = Turns("role", "content")
SHAREGPT = Turns("from", "value")
TURN_KEYS = ("messages", "conversations", "conversation")
REASONS = {
    "messages": N_("the rows have a list of turns with `role` and `content`"),
    "sharegpt": N_("the rows have a list of turns with `from` and `value`"),
    "alpaca": N_("the rows have `instruction` and `output`"),
    "prompt_completion": N_("the rows have `prompt` and `completion`"),
    "text": N_("the rows have `text`"),
}
# The columns of each kind; the first ones must be there.
_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
COLUMNS = frozenset(
    {"messages", "conversations", "conversation", "tools", "system", "role", "content", "from", "value"}
    | {"instruction", "input", "output", "history", "prompt", "completion", "text"}
)
_IN_TURNS = ("role", "content", "from", "value")
# Other people's names for our columns.
_SYNONYMS = {
    "instruction": ("question", "query", "user", "human", "task", "質問", "指示", "問題"),
    "input": ("context", "passage", "文脈", "入力"),
    "output": ("response", "answer", "target", "completion", "assistant", "回答", "応答", "出力", "解答"),
    "prompt": ("question", "query", "instruction", "質問", "問題"),
    "completion": ("response", "answer", "chosen", "output", "target", "回答", "応答"),
    "text": ("content", "body", "document", "sentence", "article", "本文", "文章", "テキスト"),
    "messages": ("dialogue", "dialog", "chat", "turns"),
    "conversations": ("dialogue", "dialog", "chat", "turns"),
}


@dataclass(frozen=True)
class Detection:
    """What kind the rows are (None: not recognised) and why, in a sentence."""

    kind: str | None
    reason: str


def kind_of(value: Any) -> str | None:
    """The kind of one row as read; None when no kind fits."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, Mapping):
        return None
    for key in TURN_KEYS:
        turns = _maybe_json(value.get(key))
        if isinstance(turns, list):
            first = next((turn for turn in turns if isinstance(turn, Mapping)), {})
            named_sharegpt = not first and key != "messages"
            return "sharegpt" if "from" in first or named_sharegpt else "messages"
    for kind in ("alpaca", "prompt_completion", "text"):
        if all(key in value for key in _REQUIRED[kind]):
            return kind
    return None


def detect(values: Iterable[Any]) -> Detection:
    """The kind of most of `values` (the first rows of a file, renamed already)."""
    rows = list(values)
    votes = Counter(kind for kind in map(kind_of, rows) if kind)
    if votes:
        kind = votes.most_common(1)[0][0]
        return Detection(kind, tr(REASONS[kind]))
    found = list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))
    if not found:
        return Detection(None, tr("The rows are not objects with named columns."))
    return Detection(None, tr("The form of the rows is not recognised; their columns are {found}.", found=_list(found)))


def recognition_remedy(values: Iterable[Any]) -> str:
    """What to write in the recipe so that rows like `values` are recognised."""
    found = list(dict.fromkeys(key for row in values if isinstance(row, Mapping) for key in row))
    ranked = sorted(
        ((_suggest(kind, found), kind) for kind in _REQUIRED),
        key=lambda item: (len(item[0]) == len(_REQUIRED[item[1]]), len(_REQUIRED[item[1]])),
    )
    matches, kind = ranked[-1]
    renamed = {usual: yours for usual, yours in matches.items() if usual != yours}
    if len(matches) == len(_REQUIRED[kind]) and renamed:
        return tr("If they are what they seem, say so with {columns}.", columns=columns_text(renamed))
    return tr(
        "Known forms: messages, conversations, instruction + output, prompt + completion, text. "
        "Name columns that differ with {columns}.",
        columns="`columns: {instruction: …, output: …}`",
    )


def columns_text(columns: Mapping[str, str]) -> str:
    """The recipe line that renames `columns` (usual: yours)."""
    return "`columns: {" + ", ".join(f"{usual}: {yours}" for usual, yours in columns.items()) + "}`"


def _suggest(kind: str, found: list[str]) -> dict[str, str]:
    matches: dict[str, str] = {}
    for usual in _REQUIRED[kind]:
        nearest = nearest_column(usual, [name for name in found if name not in matches.values()])
        if nearest:
            matches[usual] = nearest
    return matches


def nearest_column(usual: str, found: Iterable[str]) -> str | None:
    """Which of the columns `found` is probably the one usually called `usual`."""
    names = {str(name).strip().lower(): str(name) for name in found}
    if usual in names:
        return names[usual]
    for synonym in _SYNONYMS.get(usual, ()):
        if synonym in names:
            return names[synonym]
    close = difflib.get_close_matches(usual, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None


def rename(value: Any, columns: Mapping[str, str] | None) -> Any:
    """`value` with the columns renamed as `usual: yours` says, in its turns too (role, content, from, value)."""
    if not columns or not isinstance(value, Mapping):
        return value
    outer = {yours: usual for usual, yours in columns.items() if usual not in _IN_TURNS}
    inner = {yours: usual for usual, yours in columns.items() if usual in _IN_TURNS}
    row = _renamed(value, outer)
    if inner:
        for key in TURN_KEYS:
            turns = _maybe_json(row.get(key))
            if isinstance(turns, list):
                row[key] = [_renamed(turn, inner) if isinstance(turn, Mapping) else turn for turn in turns]
    return row


def _renamed(value: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    taken = set(names.values())
    kept = {key: item for key, item in value.items() if key not in names and key not in taken}
    return kept | {names[key]: item for key, item in value.items() if key in names}


def normalise(value: Any, kind: str, origin: Origin) -> Row:
    """The row in the one form everything is turned into.

    Raises:
        BadRow: names the key and says what was expected and found.
    """
    if kind == "text" and isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise BadRow("", tr("expected an object with named columns, found {found}", found=type_name(value)))
    return _NORMALISERS[kind](value, origin)


def _messages(row: Mapping[str, Any], origin: Origin) -> Row:
    return _conversation(row, origin, OPENAI, "messages")


def _sharegpt(row: Mapping[str, Any], origin: Origin) -> Row:
    return _conversation(row, origin, SHAREGPT, "conversations")


def _conversation(row: Mapping[str, Any], origin: Origin, names: Turns, usual: str) -> Row:
    key = next((key for key in (usual, *TURN_KEYS) if row.get(key) is not None), usual)
    if key not in row:
        raise _missing(key, row)
    messages = read_turns(_maybe_json(row[key]), key, names)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": whole(system, "system")})
    _require_answer(messages, key)
    return Row(origin, messages=tuple(messages), tools=_tools(row))


def _require_answer(messages: list[dict[str, Any]], key: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(key, tr("there is no assistant turn, so nothing could be learnt from it"))


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = _maybe_json(row.get("tools"))
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools", tr("expected a list of tool descriptions, found {found}", found=type_name(tools)))
    return tuple(dict(tool) for tool in tools)


def _alpaca(row: Mapping[str, Any], origin: Origin) -> Row:
    instruction = _string(row, "instruction")
    more = _optional(row, "input")
    answer = _filled(row, "output")
    question = "\n\n".join(part for part in (instruction, more) if part.strip())
    if not question:
        raise BadRow("instruction", tr("the text is empty"))
    messages: list[dict[str, Any]] = []
    system = _optional(row, "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    messages += _history(row)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(origin, messages=tuple(messages))


def _history(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = _maybe_json(row.get("history"))
    if history is None or history == "":
        return []
    if not isinstance(history, list):
        raise BadRow(
            "history", tr("expected a list of [question, answer] pairs, found {found}", found=type_name(history))
        )
    messages: list[dict[str, Any]] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"history[{index}]", tr("expected a [question, answer] pair of strings"))
        if not pair[1].strip():
            raise BadRow(f"history[{index}][1]", tr("the assistant's turn is empty"))
        asked, answered = (whole(text, f"history[{index}]") for text in pair)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def _prompt_completion(row: Mapping[str, Any], origin: Origin) -> Row:
    for key in ("prompt", "completion"):
        if key not in row:
            raise _missing(key, row)
    prompt, completion = _maybe_json(row["prompt"]), _maybe_json(row["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        return _prompt_messages(prompt, completion, origin, row)
    context, answer = _string(row, "prompt"), _filled(row, "completion")
    return Row(origin, text=context + answer, trained_from=len(context))


def _prompt_messages(prompt: Any, completion: Any, origin: Origin, row: Mapping[str, Any]) -> Row:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    asked = read_turns(prompt, "prompt", OPENAI)
    answered = read_turns(completion, "completion", OPENAI)
    _require_answer(answered, "completion")
    # Earlier answers are context here: only the completion is what the row teaches.
    context = [message | {"weight": 0} if message["role"] == "assistant" else message for message in asked]
    return Row(origin, messages=(*context, *answered), tools=_tools(row))


def _text(row: Mapping[str, Any], origin: Origin) -> Row:
    return Row(origin, text=_filled(row, "text"))


def _string(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise _missing(key, row)
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(key, tr("expected a string, found {found}", found=type_name(value)))
    return whole(value, key)


def _filled(row: Mapping[str, Any], key: str) -> str:
    value = _string(row, key)
    if not value.strip():
        raise BadRow(key, tr("the text is empty"))
    return value


def _optional(row: Mapping[str, Any], key: str) -> str:
    return "" if row.get(key) is None else _string(row, key)


def _missing(key: str, row: Mapping[str, Any]) -> BadRow:
    found = _list(row) or "—"
    nearest = nearest_column(key, row)
    if nearest:
        columns = columns_text({key: nearest})
        return BadRow(key, tr("the key is missing; found {found}. Is it {columns}?", found=found, columns=columns))
    return BadRow(key, tr("the key is missing; found {found}", found=found))


def _list(names: Iterable[str], limit: int = 8) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:limit]) + (" …" if len(shown) > limit else "")


def _maybe_json(value: Any) -> Any:
    """Lists written as JSON inside a string: the only way a CSV cell or a flat table can hold them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


_NORMALISERS: dict[str, Callable[[Mapping[str, Any], Origin], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
