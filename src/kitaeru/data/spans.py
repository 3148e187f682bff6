"""Which characters of a rendered conversation an assistant wrote, whatever the chat template.

A turn is found by changing it: the conversation is rendered as it is, and once more with the turn's content replaced
by a mark that occurs nowhere else. What the two texts share in front of and behind the mark is not the turn's; what
remains is the turn, however the template trims, moves or rewrites it. The end-of-turn token behind it is added, and so
is what the template writes between its generation prompt and the content (an empty think block): in a chat the model
has to produce both. Where that gives no consistent answer, renderings of the conversation's beginnings are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from kitaeru.errors import DataError
from kitaeru.i18n import tr

Message = dict[str, Any]
Span = tuple[int, int]

# What ends a turn in the families that end inner and last turns differently, or that close with another token than eos.
_CLOSINGS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "</s>", "<|end|>", "<|return|>", "<|call|>",
    "<|endoftext|>", "<|end_of_text|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


class Refusal(Exception):  # noqa: N818 - internal: becomes a DataError that knows the row
    """A template does not take these messages; the text is what it said."""


class Template:
    """A tokenizer's chat template: renders messages and knows its generation prompt and what closes a turn."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token
        self.closings: tuple[str, ...] = (eos, *_CLOSINGS) if eos else _CLOSINGS
        self.prompt, self.closing = self._probe()

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), *, prompt: bool = False) -> str:
        """The text of `messages`, with the beginning of an answer behind it when `prompt`.

        Raises:
            Refusal: the template does not take them.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise Refusal(str(error)) from error
        return text

    def _probe(self) -> tuple[str, str]:
        """The generation prompt and the end of turn, from the smallest conversation there is; "" where unclear."""
        question, mark = {"role": "user", "content": "x"}, "\ue000"
        try:
            plain, asked = self.render([question]), self.render([question], prompt=True)
            tail = self.render([question, {"role": "assistant", "content": mark}]).partition(mark)[2]
        except Refusal:
            return "", ""
        return asked[len(plain) :] if asked.startswith(plain) else "", tail.rstrip() or tail


@dataclass(frozen=True)
class _Region:
    """The characters of a text that a turn's content makes, and where the mark stood in the text of the turn `changed`.

    `partial`: marks replaced parts of the turn only (a call's brackets were left at both ends).
    """

    start: int
    end: int
    mark: int
    changed: Message
    partial: bool


def assistant_spans(
    template: Template, messages: Sequence[Message], tools: Sequence[Message]
) -> tuple[str, list[Span]]:
    """The rendered text and the characters [start, end) of each assistant turn in it, in the order of `messages`.

    Raises:
        Refusal: the template does not take the messages.
        DataError: the template mixes up turns so that an assistant's characters cannot be told from others.
    """
    text = template.render(messages, tools)
    spans = _by_marks(template, messages, tools, text)
    if spans is None:
        spans = _by_prefixes(template, messages, tools, text)
    if spans is None:
        raise DataError(
            tr("The chat template renders this conversation so that the assistant's words cannot be told from others."),
            remedy=tr("Give a template that writes the turns one after another with `model.chat_template`."),
        )
    return text, spans


def is_rendered(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], index: int, text: str
) -> bool:
    """Whether the content of message `index` has a place in the rendered `text`.

    Raises:
        Refusal: the template does not take the messages.
    """
    content = messages[index].get("content")
    if not isinstance(content, str) or content.strip() in text:
        return True
    mark = _mark(text)
    return mark in template.render(_replaced(messages, index, {**messages[index], "content": mark}), tools)


def _by_marks(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], text: str
) -> list[Span] | None:
    mark, spans, done = _mark(text), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        region = _region(template, messages, tools, index, text, mark)
        if region is None or not _plausible(message, text[region.start : region.end]):
            return None
        start = _written_from(template, messages, tools, index, text, region, mark)
        end = _closed_at(template, text, region)
        if start < done or end < start:
            return None
        spans.append((start, end))
        done = end
    return spans


def _region(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], index: int, text: str, mark: str
) -> _Region | None:
    for changed, partial in _changed(messages[index], mark):
        try:
            other = template.render(_replaced(messages, index, changed), tools)
        except Refusal:
            continue
        if mark in other:
            start = _shared_prefix(text, other)
            tail = _shared_suffix(text[start:], other[start:])
            return _Region(start, len(text) - tail, other.index(mark), changed, partial)
    return None


def _changed(message: Message, mark: str) -> Iterator[tuple[Message, bool]]:
    """`message` with everything replaced by `mark`; then, for templates that insist on calls, with marked calls."""
    yield {"role": message["role"], "content": mark}, False
    if message.get("tool_calls"):
        calls = [
            {**call, "function": {"name": mark, "arguments": {mark: mark}}} if "function" in call else call
            for call in message["tool_calls"]
        ]
        yield {**message, "content": mark, "tool_calls": calls}, True


def _plausible(message: Message, region: str) -> bool:
    """A plain answer is in the text as it is, trimmed or shortened at most; calls and thoughts may be rewritten."""
    content = message.get("content")
    if message.get("tool_calls") or not isinstance(content, str) or "think" in content:
        return True
    if set(message) - {"role", "content", "name"}:
        return True
    return region.strip() in content


def _written_from(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Message],
    index: int,
    text: str,
    region: _Region,
    mark: str,
) -> int:
    """Where the assistant starts to write: behind the template's generation prompt."""
    header = template.prompt
    if not header:
        if region.partial:
            return _after_previous(template, messages, tools, index, region, mark)
        # The separating space of templates without a header is the model's to produce.
        return region.start - 1 if text[: region.start].endswith(" ") else region.start
    if text.endswith(header, 0, region.start):
        return region.start
    literal = _literal_before(template, messages, tools, index, region.changed, mark)
    at = literal.rfind(header)
    if at < 0:
        return region.start
    return min(region.start, region.mark - (len(literal) - at - len(header)))


def _after_previous(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], index: int, region: _Region, mark: str
) -> int:
    """Where the message before `index` ends: in the conversation cut there, what follows its content is its own."""
    literal = _literal_before(template, messages, tools, index, region.changed, mark)
    before = chr(ord(mark) + 1)
    try:
        closing = template.render(_marked(messages[:index], index - 1, before), tools).partition(before)[2]
    except Refusal:
        return region.start
    if not closing or not literal.startswith(closing):
        return region.start
    return min(region.start, region.mark - (len(literal) - len(closing)))


def _literal_before(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], index: int, changed: Message, mark: str
) -> str:
    """What the template writes between the content of the message before `index` and the mark in `changed`."""
    before = chr(ord(mark) + 1)
    marked = _replaced(messages, index, changed)
    try:
        text, _, _ = template.render(_marked(marked, index - 1, before), tools).partition(mark)
    except Refusal:
        return ""
    _, found, literal = text.rpartition(before)
    return literal if found or not index else ""


def _marked(messages: Sequence[Message], index: int, mark: str) -> list[Message]:
    """`messages` with the content of message `index`, if there is one, replaced."""
    if index < 0:
        return list(messages)
    return _replaced(messages, index, {**messages[index], "content": mark})


def _closed_at(template: Template, text: str, region: _Region) -> int:
    """The end of the turn with its end-of-turn token."""
    if template.closing and text.startswith(template.closing, region.end):
        return region.end + len(template.closing)
    begin = region.end
    while begin < len(text) and text[begin].isspace():
        begin += 1
    for closing in template.closings:
        if text.startswith(closing, begin):
            return begin + len(closing)
    at = text.find(template.closing, region.end) if region.partial and template.closing else -1
    return at + len(template.closing) if at >= 0 else region.end


def _by_prefixes(
    template: Template, messages: Sequence[Message], tools: Sequence[Message], text: str
) -> list[Span] | None:
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = template.render(messages[:index], tools, prompt=True) if index else ""
            after = template.render(messages[: index + 1], tools).rstrip()
        except Refusal:
            return None
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _replaced(messages: Sequence[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _mark(text: str) -> str:
    """A character for private use such that neither it nor the next one is in `text`."""
    return next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text and chr(c + 1) not in text)


def _shared_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _shared_suffix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.endswith(b[len(b) - middle :]):
            low = middle
        else:
            high = middle - 1
    return low
