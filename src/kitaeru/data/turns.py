"""The turns of a conversation: OpenAI's and ShareGPT's names, roles and tool calls, into OpenAI's form."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kitaeru.i18n import tr

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_HALF = re.compile("[\ud800-\udfff]")
_KEPT = ("name", "tool_call_id", "reasoning_content", "weight")


class BadRow(Exception):  # noqa: N818 - a row's fault, caught while reading
    """A row that cannot be used: the `key` at fault and the `problem`, translated."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


@dataclass(frozen=True)
class Turns:
    """What the two columns of a turn are called."""

    role: str
    content: str


def type_name(value: Any) -> str:
    """What JSON calls the type of `value`."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "object"
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", tuple: "array"}
    return names.get(type(value), type(value).__name__)


def whole(text: str, place: str) -> str:
    """`text` itself, which JSON's \\ud83d-like escapes may have left with half a character no tokenizer can take.

    Raises:
        BadRow: it has such a half.
    """
    if _HALF.search(text):
        raise BadRow(place, tr("the text holds half of a character (a lone surrogate such as \\ud83d)"))
    return text


def read_turns(value: Any, key: str, names: Turns) -> list[dict[str, Any]]:
    """The turns in OpenAI's form: role in system, user, assistant, tool; content a string; arguments an object.

    Raises:
        BadRow: names the turn and says what was expected and found.
    """
    if not isinstance(value, list):
        raise BadRow(key, tr("expected a list of turns, found {found}", found=type_name(value)))
    if not value:
        raise BadRow(key, tr("the conversation has no turns"))
    return [_turn(turn, f"{key}[{index}]", names) for index, turn in enumerate(value)]


def _turn(turn: Any, place: str, names: Turns) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(place, tr("expected an object, found {found}", found=type_name(turn)))
    for name in (names.role, names.content):
        if name not in turn and not (name == names.content and (turn.get("tool_calls") or turn.get("function_call"))):
            found = ", ".join(map(str, turn)) or "—"
            raise BadRow(f"{place}.{name}", tr("the key is missing; found {found}", found=found))
    written = turn[names.role]
    role = _role(written, f"{place}.{names.role}")
    message: dict[str, Any] = {"role": role}
    if written == "function_call":
        message |= {"content": "", "tool_calls": _called(turn[names.content], f"{place}.{names.content}")}
        return message
    old_call = turn.get("function_call")
    calls = turn.get("tool_calls") or ([old_call] if isinstance(old_call, Mapping) else None)
    message["content"] = _content(turn.get(names.content), f"{place}.{names.content}", null_allowed=bool(calls))
    if role == "assistant" and not message["content"].strip() and not calls:
        raise BadRow(f"{place}.{names.content}", tr("the assistant's turn is empty"))
    if calls:
        message["tool_calls"] = _calls(calls, role, f"{place}.tool_calls")
    return message | {name: turn[name] for name in _KEPT if turn.get(name) is not None}


def _role(role: Any, place: str) -> str:
    if not isinstance(role, str):
        raise BadRow(place, tr("expected a string, found {found}", found=type_name(role)))
    if role in ROLES:
        return ROLES[role]
    close = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.7)
    known = "system, user (human), assistant (gpt), tool (observation), function_call"
    if close:
        raise BadRow(place, tr('unknown role "{role}"; did you mean "{nearest}"?', role=role, nearest=close[0]))
    raise BadRow(place, tr('unknown role "{role}"; known are {known}', role=role, known=known))


def _content(content: Any, place: str, *, null_allowed: bool) -> str:
    if isinstance(content, str):
        return whole(content, place)
    if content is None and null_allowed:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{place}[{index}]") for index, part in enumerate(content))
    raise BadRow(place, tr("expected a string or a list of text parts, found {found}", found=type_name(content)))


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return whole(part, place)
    if not isinstance(part, Mapping):
        raise BadRow(place, tr("expected a text part, found {found}", found=type_name(part)))
    if part.get("type", "text") != "text":
        raise BadRow(place, tr('a part of type "{type}": only text can be trained', type=part["type"]))
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRow(f"{place}.text", tr("expected a string, found {found}", found=type_name(text)))
    return whole(text, f"{place}.text")


def _calls(calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise BadRow(place, tr("only the assistant can call tools, this turn is of {role}", role=role))
    if not isinstance(calls, list):
        raise BadRow(place, tr("expected a list of tool calls, found {found}", found=type_name(calls)))
    return [_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        raise BadRow(place, tr("expected an object with name and arguments, found {found}", found=type_name(function)))
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(f"{place}.name", tr("the name of the called function is missing"))
    arguments = _arguments(function.get("arguments"), f"{place}.arguments")
    head = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
    return head | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Any, place: str) -> dict[str, Any]:
    """OpenAI writes the arguments as JSON in a string; chat templates want the object itself."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise BadRow(place, tr("the arguments are not valid JSON")) from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise BadRow(place, tr("expected an object, found {found}", found=type_name(arguments)))
    whole(json.dumps(arguments, ensure_ascii=False, default=str), place)
    return dict(arguments)


def _called(value: Any, place: str) -> list[dict[str, Any]]:
    """The tool calls of ShareGPT's `function_call` turn: one {name, arguments} or a list of them, as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(place, tr("a function_call turn must hold JSON with name and arguments")) from None
    return _calls(value if isinstance(value, list) else [value], "assistant", place)
