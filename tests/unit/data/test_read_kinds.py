"""Every kind of row becomes the one form; every way it can be wrong is named by key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kitaeru.data.kinds import detect, kind_of, normalise, recognition_remedy, rename
from kitaeru.data.turns import BadRow
from kitaeru.data.types import Origin, Row

HERE = Origin("rows.jsonl", 1)
USER = {"role": "user", "content": "質問"}
ANSWER = {"role": "assistant", "content": "答え"}


def row(value: Any, kind: str | None = None) -> Row:
    return normalise(value, kind or kind_of(value) or "none", HERE)


def pairs(value: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row(value).messages]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"messages": [USER, ANSWER], "id": 1, "source": "x", "licence": "MIT"}, "messages"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "質問"}, {"from": "gpt", "value": "答え"}]}, "sharegpt"),
        ({"messages": [{"from": "user", "value": "質問"}, {"from": "assistant", "value": "答え"}]}, "sharegpt"),
        ({"instruction": "質問", "input": "", "output": "答え", "text": "whole"}, "alpaca"),
        ({"prompt": "質問", "completion": "答え"}, "prompt_completion"),
        ({"text": "文章", "title": "題"}, "text"),
        ("文章", "text"),
        ({"question": "質問"}, None),
        (["質問"], None),
    ],
)
def test_kind_is_recognised(value: Any, kind: str | None) -> None:
    assert kind_of(value) == kind


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "質"}, {"type": "text", "text": "問"}]},
                ANSWER,
            ]
        },
        {"conversations": [{"from": "human", "value": "質問"}, {"from": "gpt", "value": "答え"}]},
        {"conversations": [{"from": "user", "value": "質問"}, {"from": "assistant", "value": "答え"}]},
        {"instruction": "質問", "output": "答え"},
        {"instruction": "質問", "input": None, "output": "答え"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "質問", "completion": [ANSWER]},
        {"prompt": [USER], "completion": "答え"},
    ],
)
def test_conversations_come_out_alike(value: Any) -> None:
    assert row(value).messages == (USER, ANSWER)


def test_alpaca_input_system_and_history() -> None:
    value = {"instruction": "訳せ", "input": "dog", "output": "犬", "system": "訳者", "history": [["cat", "猫"]]}
    assert pairs(value) == [
        ("system", "訳者"),
        ("user", "cat"),
        ("assistant", "猫"),
        ("user", "訳せ\n\ndog"),
        ("assistant", "犬"),
    ]


def test_prompt_and_completion_strings_are_text_trained_from_the_completion() -> None:
    made = row({"prompt": "問い：\n", "completion": "答え"})
    assert (made.text, made.trained_from, made.messages) == ("問い：\n答え", 4, ())


def test_answers_inside_a_prompt_are_context() -> None:
    made = row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [message.get("weight") for message in made.messages] == [None, 0, None, None]


def test_tool_calls_in_both_forms() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    openai = {
        "messages": [
            {"role": "developer", "content": "助手"},
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "東京"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "晴れ"},
            ANSWER,
        ],
        "tools": tools,
    }
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "助手"},
            {"from": "human", "value": "質問"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "東京"}}'},
            {"from": "observation", "value": "晴れ"},
            {"from": "gpt", "value": "答え"},
        ],
        "tools": json.dumps(tools),
    }
    first, second = row(openai), row(sharegpt)
    assert first.tools == second.tools == tuple(tools)
    assert [m["role"] for m in first.messages] == [m["role"] for m in second.messages]
    for made in (first, second):
        function = made.messages[2]["tool_calls"][0]["function"]
        assert function == {"name": "weather", "arguments": {"city": "東京"}}
        assert made.messages[2]["content"] == ""
    assert first.messages[3]["tool_call_id"] == first.messages[2]["tool_calls"][0]["id"] == "c1"


def test_sharegpt_system_column_comes_first() -> None:
    value = {"system": "役", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert pairs(value)[0] == ("system", "役")


@pytest.mark.parametrize(
    ("value", "kind", "key", "says"),
    [
        ({"messages": [USER]}, "messages", "messages", "no assistant turn"),
        ({"messages": []}, "messages", "messages", "no turns"),
        ({"messages": "hello"}, "messages", "messages", "found string"),
        ({"messages": [USER, "hi"]}, "messages", "messages[1]", "found string"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages", "messages[1].content", "empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages", "messages[1].content", "found null"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages", "messages[1].content", "missing"),
        ({"messages": [{"content": "x"}, ANSWER]}, "messages", "messages[0].role", "missing"),
        ({"messages": [{"role": 1, "content": "x"}, ANSWER]}, "messages", "messages[0].role", "found number"),
        ({"messages": [USER, {"role": "asistant", "content": "x"}]}, "messages", "messages[1].role", '"assistant"'),
        ({"messages": [USER, {"role": "zzz", "content": "x"}]}, "messages", "messages[1].role", "known are system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "messages",
            "messages[0].content[0]",
            "image_url",
        ),
        ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}, ANSWER]}, "messages", "messages[0].tool_calls", "only"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
            "messages[1].tool_calls[0].arguments",
            "not valid JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "x"}, "messages", "tools", "found string"),
        ({"mesages": [USER, ANSWER]}, "messages", "messages", "columns: {messages: mesages}"),
        ({"conversations": [{"from": "human", "value": 3}]}, "sharegpt", "conversations[0].value", "found number"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "sharegpt", "conversations[0].value", "JSON"),
        ({"instruction": "a"}, "alpaca", "output", "missing"),
        ({"instruction": "a", "response": "b"}, "alpaca", "output", "columns: {output: response}"),
        ({"instruction": "a", "output": ["b"]}, "alpaca", "output", "found array"),
        ({"instruction": "a", "output": ""}, "alpaca", "output", "empty"),
        ({"instruction": " ", "output": "b"}, "alpaca", "instruction", "empty"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "alpaca", "history[0]", "pair"),
        ({"prompt": "a", "completion": " "}, "prompt_completion", "completion", "empty"),
        ({"prompt": [USER], "completion": [USER]}, "prompt_completion", "completion", "no assistant turn"),
        ({"text": "\n"}, "text", "text", "empty"),
        ({"text": None}, "text", "text", "found null"),
        (3, "text", "", "found number"),
    ],
)
def test_bad_rows_name_the_key_and_what_was_found(value: Any, kind: str, key: str, says: str) -> None:
    with pytest.raises(BadRow) as caught:
        row(value, kind)
    assert caught.value.key == key
    assert says in caught.value.problem


def test_detection_follows_the_majority_and_says_why() -> None:
    alpaca = {"instruction": "a", "output": "b"}
    found = detect([alpaca, {"text": "x"}, alpaca])
    assert found.kind == "alpaca"
    assert "`instruction`" in found.reason


def test_unknown_columns_are_listed_with_the_line_that_helps() -> None:
    values = [{"id": 1, "question": "a", "answer": "b"}]
    found = detect(values)
    assert found.kind is None
    assert "id, question, answer" in found.reason
    assert "`columns: {prompt: question, completion: answer}`" in recognition_remedy(values)


def test_preference_pairs_can_be_read_by_their_chosen_side() -> None:
    values = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}]
    assert "`columns: {completion: chosen}`" in recognition_remedy(values)


def test_rename_outer_and_inner_columns() -> None:
    assert rename({"a": 1, "b": 2}, {"b": "a", "a": "b"}) == {"b": 1, "a": 2}
    turns = {"messages": [{"speaker": "user", "said": "質問"}, {"speaker": "assistant", "said": "答え"}]}
    assert row(rename(turns, {"role": "speaker", "content": "said"}), "messages").messages == (USER, ANSWER)
