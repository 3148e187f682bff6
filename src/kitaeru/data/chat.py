"""From rows to tokens: the chat template's text, and which of its tokens the model learns to produce."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kitaeru.data.spans import Message, Refusal, Span, Template, assistant_spans, is_rendered
from kitaeru.data.types import Example, Row
from kitaeru.errors import DataError
from kitaeru.i18n import tr

TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Rendered:
    """The text of a row and the characters [start, end) to learn. `closed`: BOS and EOS come around it as tokens."""

    row: Row
    text: str
    spans: list[Span]
    closed: bool


def tokenise_row(row: Row, tokenizer: Any, *, train_on: TrainOn = "assistant") -> Example:
    """The tokens of `row` and which of them are trained.

    A conversation is rendered by the tokenizer's chat template and tokenised once as a whole, without adding a second
    BOS. A token belongs to the assistant when it begins inside a turn; a word's leading space may stand before it.
    Raw text gets the tokenizer's BOS, if it adds one, and EOS; all but the BOS is trained, or all from `trained_from`.

    Raises:
        DataError: the template does not take the row, leaves a message out, or there is none. Names the row.
    """
    return Encoder(tokenizer, train_on).encode([row])[0]


class Encoder:
    """Turns rows into examples with one tokenizer."""

    def __init__(self, tokenizer: Any, train_on: TrainOn = "assistant") -> None:
        self._tokenizer, self._train_on = tokenizer, train_on
        self._template: Template | None = None
        plain, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
        self._begins = bool(len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of `rows`, in order.

        Raises:
            DataError: as `tokenise_row`.
        """
        return self.tokens([self.render(row) for row in rows])

    def render(self, row: Row) -> Rendered:
        """The text of `row` and its trained characters.

        Raises:
            DataError: as `tokenise_row`.
        """
        if row.text is not None:
            return Rendered(row, row.text, [(row.trained_from, len(row.text))], closed=True)
        if self._template is None:
            if not self._tokenizer.chat_template:
                raise DataError(
                    tr("This is a conversation, and the tokenizer has no chat template."),
                    where=str(row.origin),
                    remedy=tr("Give a Jinja template file with `model.chat_template`."),
                )
            self._template = Template(self._tokenizer)
        try:
            return _render_conversation(self._template, row, self._train_on)
        except DataError as error:
            raise DataError(error.what, where=str(row.origin), remedy=error.remedy) from error

    def tokens(self, rendered: Sequence[Rendered]) -> list[Example]:
        """The examples of rendered rows, in order."""
        if not rendered:
            return []
        encoded = self._tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._example(item, ids, offsets) for item, (ids, offsets) in zip(rendered, pairs, strict=True)]

    def _example(self, item: Rendered, ids: list[int], offsets: list[Span]) -> Example:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        ids, trained = list(ids), trained_tokens(item.text, offsets, item.spans)
        if item.closed and self._begins and ids[:1] != [bos]:
            ids, trained = [bos, *ids], [False, *trained]
        if item.closed and eos is not None and ids[-1:] != [eos]:
            ids, trained = [*ids, eos], [*trained, True]
        if ids and ids[0] == bos:
            trained[0] = False
        return Example(item.row.origin, ids, trained)


def trained_tokens(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it begins inside one of `spans` (sorted, apart).

    A token that begins before a span with nothing but spaces is inside too: `▁word` carries the space before its word.
    """
    trained, at = [], 0
    for begin, end in offsets:
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        if at == len(spans):
            trained.append(False)
            continue
        start, stop = spans[at]
        leading = begin < start < min(end, stop) and not text[begin:start].strip(" ")
        trained.append(start <= begin or leading)
    return trained


def _render_conversation(template: Template, row: Row, train_on: TrainOn) -> Rendered:
    forms = [[_plain(m, parse) for m in row.messages] for parse in (True, False)]
    for number, messages in enumerate(forms):
        try:
            text, spans = assistant_spans(template, messages, row.tools)
            _check_nothing_lost(template, messages, row.tools, text)
            _check_calls(messages, row.tools, text)
        except Refusal as refusal:
            if number == 0 and forms[0] != forms[1]:
                continue  # some templates want a call's arguments as the string OpenAI sends
            raise _refused(template, forms[0], row.tools, refusal) from refusal
        break
    if train_on == "all":
        return Rendered(row, text, [(0, len(text))], closed=False)
    turns = [m for m in row.messages if m["role"] == "assistant"]
    spans = [span for span, turn in zip(spans, turns, strict=True) if turn.get("weight") != 0]
    return Rendered(row, text, spans, closed=False)


def _plain(message: Message, parse: bool) -> Message:
    """`message` as templates expect it: text content, and a call's arguments as an object if `parse`."""
    plain = {key: value for key, value in message.items() if key != "weight"}
    content = plain.get("content")
    if content is None:
        plain["content"] = ""
    elif isinstance(content, list | tuple) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        plain["content"] = "".join(part["text"] for part in content)
    if parse and plain.get("tool_calls"):
        plain["tool_calls"] = [_parsed(call) for call in plain["tool_calls"]]
    return plain


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _check_nothing_lost(template: Template, messages: Sequence[Message], tools: Sequence[Message], text: str) -> None:
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and not is_rendered(template, messages, tools, index, text):
            raise DataError(
                tr("The chat template leaves out the {role} message.", role=message["role"]), remedy=_other_template()
            )


def _check_calls(messages: Sequence[Message], tools: Sequence[Message], text: str) -> None:
    """Templates without tools pass calls over in silence and would teach an empty answer."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for name in (_function_name(item) for item in (*calls, *tools)):
        if name is not None and name not in text:
            raise DataError(
                tr("The chat template leaves out the tool {name}: it knows no tools.", name=name),
                remedy=_other_template(),
            )


def _function_name(item: Any) -> str | None:
    function = item.get("function", item) if isinstance(item, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _refused(template: Template, messages: Sequence[Message], tools: Sequence[Message], refusal: Refusal) -> DataError:
    """Name the role without whose messages the template would take the conversation."""
    for role in dict.fromkeys(m["role"] for m in messages):
        rest = [m for m in messages if m["role"] != role]
        if role in ("user", "assistant") or not rest:
            continue
        try:
            template.render(rest, tools)
        except Refusal:
            continue
        if role == "system":
            what = tr("The chat template has no place for a system message. It said: {said}", said=refusal)
        else:
            what = tr(
                "The chat template does not take a message of the role {role}. It said: {said}", role=role, said=refusal
            )
        return DataError(what, remedy=_other_template())
    roles = " → ".join(str(m["role"]) for m in messages)
    return DataError(
        tr("The chat template does not take this conversation ({roles}). It said: {said}", roles=roles, said=refusal),
        remedy=_other_template(),
    )


def _other_template() -> str:
    return tr(
        "Take such messages out of the data (and `data.system` out of the recipe), "
        "or give a template with `model.chat_template`."
    )
