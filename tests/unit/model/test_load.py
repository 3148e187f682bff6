"""Loading: dtype, quantisation, attention and what is refused."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from kitaeru.errors import ModelError
from kitaeru.kernels.packed_attention import Sight
from kitaeru.model import attention
from kitaeru.model.load import config_dict, load_config, load_model, model_source
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import ModelSection
from kitaeru.shape import ModelShape


def layout(method="lora", base="none", precision="fp32"):
    return Layout("single", method, base, precision, "keep", 256, "cpu")


def section(path, **values):
    return ModelSection(name=str(path), **values)


@pytest.mark.parametrize(
    ("method", "precision", "dtype"),
    [
        ("lora", "fp32", torch.float32),
        ("lora", "bf16", torch.bfloat16),
        ("lora", "fp16", torch.float16),
        ("full", "bf16", torch.float32),  # masters
        ("pretrain", "fp16", torch.float32),
    ],
)
def test_dtypes(tiny_model, method, precision, dtype):
    model = load_model(section(tiny_model), layout(method, precision=precision), 0)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_four_and_eight_bits(tiny_model):
    four = load_model(section(tiny_model), layout("qlora", "nf4", "bf16"), 0)
    linear = four.model.layers[0].mlp.up_proj
    assert isinstance(linear, bnb.nn.Linear4bit)
    assert linear.weight.quant_state.quant_type == "nf4"
    assert linear.weight.quant_state.nested
    assert linear.compute_dtype == torch.bfloat16
    assert not isinstance(four.lm_head, bnb.nn.Linear4bit)
    eight = load_model(section(tiny_model), layout("lora", "int8"), 0)
    assert isinstance(eight.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)


def test_pretraining_starts_from_the_seed_and_not_from_the_weights(tiny_model):
    one, again, other = (load_model(section(tiny_model), layout("pretrain"), seed) for seed in (1, 1, 2))
    kept = load_model(section(tiny_model), layout("full"), 1)
    weight = one.model.embed_tokens.weight
    assert torch.equal(weight, again.model.embed_tokens.weight)
    assert not torch.equal(weight, other.model.embed_tokens.weight)
    assert not torch.equal(weight, kept.model.embed_tokens.weight)


def test_pretraining_needs_a_config_only(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert load_model(section(tmp_path), layout("pretrain"), 0).num_parameters() > 1e6
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(section(tmp_path), layout("full"), 0)
    assert ".safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "suits"),
    [
        (LlamaConfig(), True),
        (LlamaConfig(attention_dropout=0.1), False),
        (MistralConfig(sliding_window=4096), True),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), True),
        (Gemma2Config(), True),
        (Gemma3TextConfig(use_bidirectional_attention=True), False),
        (Llama4TextConfig(), False),  # chunks
    ],
)
def test_packed_attention_suits_causal_attention_only(config, suits):
    assert attention.suits(config) == suits


@pytest.mark.parametrize(
    ("config", "sights"),
    [
        (LlamaConfig(), [Sight(), Sight()]),
        (MistralConfig(sliding_window=8), [Sight(8), Sight(8)]),
        (MistralConfig(sliding_window=None), [Sight(), Sight()]),
        (Qwen2Config(sliding_window=8, use_sliding_window=False), [Sight(), Sight()]),
        (Qwen2Config(sliding_window=8, use_sliding_window=True, max_window_layers=1), [Sight(), Sight(8)]),
        (Gemma2Config(sliding_window=8), [Sight(8, 50.0), Sight(0, 50.0)]),
        (Gemma3TextConfig(sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 13),
         [Sight(), Sight(8)]),
    ],
)  # fmt: skip
def test_what_a_layer_sees_is_read_as_its_masks_are(config, sights):
    assert [attention.sight_of(config, layer) for layer in (0, 1)] == sights


def test_a_model_that_also_sees_is_told(tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="also sees") as caught:
        load_config(section(tmp_path))
    assert "text alone" in str(caught.value)


def test_attention_may_be_chosen(tiny_model, tmp_path):
    for name, kernel in (("auto", attention.NAME), ("packed", attention.NAME), ("eager", "eager"), ("sdpa", "sdpa")):
        model = load_model(section(tiny_model, attention=name), layout(), 0)
        assert model.config._attn_implementation == kernel
    config = json.loads((tiny_model / "config.json").read_text())
    shutil.copytree(tiny_model, tmp_path / "dropout")
    (tmp_path / "dropout" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    with pytest.raises(ModelError, match="causal attention") as caught:
        load_model(section(tmp_path / "dropout", attention="packed"), layout(), 0)
    assert "model.attention" in str(caught.value)


def test_pickles_are_refused_even_beside_a_good_config(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles"):
        load_model(section(tmp_path), layout(), 0)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="nowhere") as caught:
        load_config(section(tmp_path / "nowhere"))
    assert caught.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load_config(section(tmp_path / "empty"))
    assert "config.json" in str(caught.value)


def test_a_hub_model_without_network_is_told(monkeypatch):
    with pytest.raises(ModelError, match="someone/something") as caught:
        load_config(section("someone/something"))
    assert "network" in str(caught.value)


def test_the_bundled_model_is_a_folder_of_the_package():
    assert model_source(ModelSection(name="bundled")).endswith("assets/bundled")


def test_the_config_as_data_gives_the_shape(tiny_model):
    shape = ModelShape.from_config(config_dict(load_config(section(tiny_model))))
    assert shape.vocab == 16384


@pytest.mark.parametrize("method", ["pretrain", "full"])
def test_a_kernel_that_a_family_does_not_have_is_told(tmp_path, method):
    Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(section(tmp_path, attention="sdpa"), layout(method), 0)
