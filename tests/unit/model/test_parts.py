"""A model that comes in parts is the model that comes whole."""

from __future__ import annotations

import torch

from kitaeru.model.generate import Sampling, answer
from kitaeru.model.load import load_model
from kitaeru.model.parts import outline
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, ModelSection


def test_put_together_it_answers_as_the_whole_one() -> None:
    quiet_libraries()
    section = ModelSection(name="bundled")
    layout = Layout("tensor", "lora", "none", "fp32", "keep", 64, "cpu", 2)
    model, parts = outline(section, layout, LoraSection(), 0)
    assert parts is not None
    for number in range(len(parts.layers)):
        parts.put(parts.read(number))
    whole = load_model(section, layout, 0)
    assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in whole.named_parameters())
    # How it is asked, too: the penalty for repetition is the model's own.
    assert model.generation_config.repetition_penalty == whole.generation_config.repetition_penalty == 1.2
    tokenizer = load_tokenizer(section)
    ours, theirs = (answer(m, tokenizer, text="51番目の質問。", sampling=Sampling(8)) for m in (model, whole))
    assert ours == theirs
