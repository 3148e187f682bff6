"""The questions that are asked before and after."""

import json

import pytest

from kitaeru.data.prepare import prepare
from kitaeru.engine.samples import questions
from kitaeru.model.tokenizer import load_tokenizer


@pytest.fixture
def ask(training, tiny_model, chat_data, tmp_path):
    def make(data=chat_data, method="lora", template=True, **changes):
        recipe = training.make_recipe(tiny_model, data, method, **changes)
        tokenizer = load_tokenizer(recipe.model)
        prepared = prepare(recipe, tokenizer, seq_len=64, bad_rows=None)
        if not template:
            tokenizer.chat_template = None
        return questions(recipe, prepared, tokenizer)

    return make


def test_they_come_from_the_data_up_to_the_last_answer(ask):
    first, second = ask(samples__count=2)
    assert first.shown == "0番目の質問。日本で一番高い山は?"
    assert first.messages == ({"role": "user", "content": first.shown},)
    assert second.shown.startswith("1番目")
    assert ask(samples__count=0) == []


def test_a_conversation_is_cut_before_its_last_answer(ask, tmp_path):
    data = tmp_path / "long.jsonl"
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    turns = [{"role": role, "content": f"{i}番"} for i, role in enumerate(roles)]
    data.write_text(json.dumps({"messages": turns}, ensure_ascii=False))
    [question] = ask(data)
    assert question.shown == "3番"
    assert [m["role"] for m in question.messages] == ["system", "user", "assistant", "user"]


def test_text_is_to_be_continued_and_a_prompt_is_not_given_its_completion(ask, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % ("吾輩は猫である。" * 12))
    [question] = ask(tmp_path / "text.jsonl")
    assert question.text == ("吾輩は猫である。" * 12)[:60]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "春は", "completion": "あけぼの"}\n')
    [question] = ask(tmp_path / "pairs.jsonl")
    assert "あけぼの" not in str(question)
    assert question.shown == "春は"


def test_the_recipes_own_come_first(ask):
    [question] = ask(samples__prompts=["元気?"], samples__system="丁寧に。")
    assert question.messages == ({"role": "system", "content": "丁寧に。"}, {"role": "user", "content": "元気?"})
    [question] = ask(samples__prompts=["元気?"], method="pretrain")
    assert (question.text, question.messages) == ("元気?", ())
    [question] = ask(samples__prompts=["元気?"], template=False)
    assert question.text == "元気?"
