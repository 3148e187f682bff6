"""A task score of a finished run: how often the right one of several answers is the likeliest to the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tokens of a batch, padding counted; of a prompt the last ones are read.
BATCH_TOKENS, PROMPT_TOKENS = 4096, 512
# Choices for a conversation: its own answer, and those of the next ones.
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A conversation that awaits its answer, the answers to choose from, and which is right."""

    messages: list[dict[str, Any]]
    choices: list[str]
    right: int


def questions(path: Path, most: int) -> list[Question]:
    """Of rows `question`, `choices`, `answer` (a number); or of `messages`, whose last answer is to be told from those
    of the next conversations.
    """
    with path.open(encoding="utf-8") as lines:
        rows = list(islice(map(json.loads, lines), most))
    if "choices" in rows[0]:
        return [Question([{"role": "user", "content": r["question"]}], r["choices"], r["answer"]) for r in rows]
    found = []
    for number, row in enumerate(rows):
        others = (rows[(number + step) % len(rows)]["messages"][-1]["content"] for step in range(CHOICES))
        found.append(Question(row["messages"][:-1], list(others), 0))
    return found


def accuracy(model: Any, tokenizer: Any, asked: list[Question]) -> float:
    """The share of questions whose right answer has the highest mean log-probability of a token."""
    from kitaeru.model.generate import encode_prompt, first_device

    rows: list[tuple[int, list[int], int]] = []  # question, token ids, where the answer begins
    for number, question in enumerate(asked):
        prompt = encode_prompt(tokenizer, question.messages)[0, -PROMPT_TOKENS:].tolist()
        for choice in question.choices:
            ids = tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"][:PROMPT_TOKENS]
            rows.append((number, prompt + ids, len(prompt)))
    order = sorted(range(len(rows)), key=lambda at: len(rows[at][1]))
    scores = [0.0] * len(rows)
    model.eval()
    model.set_attn_implementation("sdpa")  # rows of a batch are examples of their own
    while order:
        longest = len(rows[order[-1]][1])
        taken = order[-max(1, BATCH_TOKENS // longest) :]
        del order[-len(taken) :]
        for at, score in zip(taken, _means([rows[at][1:] for at in taken], model, first_device(model)), strict=True):
            scores[at] = score
    right, first = 0, 0
    for question in asked:
        mine = scores[first : first + len(question.choices)]
        right += mine.index(max(mine)) == question.right
        first += len(question.choices)
    return right / len(asked)


@torch.no_grad()
def _means(rows: list[tuple[list[int], int]], model: Any, device: torch.device) -> list[float]:
    """Of each row the mean log-probability of the tokens from a place on. What pads a row comes after it, where causal
    attention does not look.
    """
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True).to(device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    found = []
    for row, (own, start) in enumerate(rows):
        answer = logits[row, start - 1 : len(own) - 1].float().log_softmax(-1)
        found.append(answer.gather(1, ids[row, start : len(own), None]).mean())
    means: list[float] = torch.stack(found).tolist()
    return means


def score_of(run: Path, asked: list[Question]) -> float | None:
    """The accuracy of a run's result, on a GPU where there is one; None if the run left none."""
    from kitaeru.export.chat import open_chat

    if not ((run / "adapter").is_dir() or (run / "model").is_dir()):
        return None
    chat = open_chat(str(run))
    return accuracy(chat.voices[-1].model, chat.tokenizer, asked)
