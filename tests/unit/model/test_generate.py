"""Answers: greedy ones are the model's own, and training is left as it was."""

import copy

import pytest
import torch

from kitaeru.model import attention
from kitaeru.model.generate import Sampling, answer, encode_prompt, end_tokens
from kitaeru.model.load import load_model
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import ModelSection


@pytest.fixture(scope="module")
def speaker(tiny_model):
    section = ModelSection(name=str(tiny_model))
    model = load_model(section, Layout("single", "lora", "none", "fp32", "keep", 256, "cpu"), 0)
    # A head of its own that says words: with the embedding's it repeats the last token, which is a special one.
    generator = torch.Generator().manual_seed(3)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(16384, 64, generator=generator))
    with torch.no_grad():
        model.lm_head.weight[:300] = 0
    return model, load_tokenizer(section)


MESSAGES = ({"role": "user", "content": "こんにちは。"},)


def test_greedy_is_the_most_likely_token_each_time(speaker):
    model, tokenizer = speaker
    ids = encode_prompt(tokenizer, MESSAGES)
    plain = load_reference(model)
    for _ in range(6):
        with torch.no_grad():
            best = plain(ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, best[None, None]], 1)
    expected = tokenizer.decode(ids[0, encode_prompt(tokenizer, MESSAGES).shape[1] :], skip_special_tokens=True)
    assert expected.strip()
    assert answer(model, tokenizer, messages=MESSAGES, sampling=Sampling(max_new_tokens=6)) == expected.strip()


def load_reference(model):
    plain = copy.deepcopy(model).eval()
    plain.set_attn_implementation("eager")
    return plain


def test_training_goes_on_as_before(speaker):
    model, tokenizer = speaker
    model.train()
    model.config.use_cache = False
    answer(model, tokenizer, messages=MESSAGES, sampling=Sampling(max_new_tokens=2))
    assert model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == attention.NAME


def test_the_prompt_is_rendered_once(speaker):
    _, tokenizer = speaker
    ids = encode_prompt(tokenizer, MESSAGES)[0].tolist()
    rendered = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) <= 1
    text = encode_prompt(tokenizer, text="昔々")[0].tolist()
    assert text == tokenizer("昔々")["input_ids"]


def test_every_end_token_ends(speaker):
    model, tokenizer = speaker
    model.generation_config.eos_token_id = [2, 9]
    assert end_tokens(model, tokenizer) == sorted({2, 9, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_sampling_follows_the_seed(speaker):
    model, tokenizer = speaker
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampling = Sampling(max_new_tokens=12, temperature=1.5, top_p=1.0)
        said.append(answer(model, tokenizer, messages=MESSAGES, sampling=sampling))
    assert said[0] == said[1] != said[2]
