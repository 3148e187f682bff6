"""The questions that are answered before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kitaeru.data.prepare import Prepared
from kitaeru.recipe.types import Recipe


@dataclass(frozen=True)
class Question:
    """`messages` for a chat model, or `text` to continue; `shown` is what a person reads."""

    shown: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None


def questions(recipe: Recipe, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """From the recipe, or else the first examples of the validation (or training) data up to their last answer."""
    section = recipe.samples
    if section.prompts:
        if tokenizer.chat_template is None or recipe.method == "pretrain":
            return [Question(prompt, text=prompt) for prompt in section.prompts]
        system = ({"role": "system", "content": section.system},) if section.system else ()
        return [Question(p, (*system, {"role": "user", "content": p})) for p in section.prompts]
    found = []
    for row in data.sample_rows[: section.count]:
        if row.messages:
            last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
            before = row.messages[:last]
            if before:
                found.append(Question(str(before[-1].get("content") or ""), tuple(before)))
        elif row.text:
            cut = row.trained_from or len(row.text[:60])
            found.append(Question(row.text[:cut], text=row.text[:cut]))
    return found
