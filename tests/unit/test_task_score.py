"""A task score is what it says: rows scored in batches as they are alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import task_score
import torch
from task_score import accuracy, questions
from transformers import AutoModelForCausalLM, AutoTokenizer

from kitaeru.model.generate import encode_prompt


def rows(path: Path) -> Path:
    lines = [
        {
            "question": f"{i}の次の数は?",
            "choices": [str(i), f"{i + 1}です。" * (1 + i % 3), "わかりません"],
            "answer": i % 3,
        }
        for i in range(7)
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def test_the_likeliest_answer_is_compared_with_the_right_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_score, "BATCH_TOKENS", 100)  # several batches, rows padded
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    asked = questions(rows(tmp_path / "task.jsonl"), 7)
    right = 0
    for question in asked:
        prompt, means = encode_prompt(tokenizer, question.messages), []
        for choice in question.choices:
            ids = tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(torch.cat([prompt, ids], 1)).logits[0, prompt.shape[1] - 1 : -1]
            means.append(-torch.nn.functional.cross_entropy(logits, ids[0]))
        right += int(torch.stack(means).argmax()) == question.right
    assert 0 < right < 7
    assert accuracy(model, tokenizer, asked) == right / 7


def test_a_conversation_is_asked_for_its_own_answer(chat_data: Path) -> None:
    first, *_, last = questions(chat_data, 24)
    lines = [json.loads(line)["messages"] for line in chat_data.read_text(encoding="utf-8").splitlines()]
    assert first.messages == lines[0][:-1]
    assert first.choices == [lines[i][-1]["content"] for i in range(4)]
    assert last.choices[:2] == [lines[23][-1]["content"], lines[0][-1]["content"]]
    assert first.right == last.right == 0
