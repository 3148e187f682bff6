"""Adapters: what is trained, and mistakes in the targets."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kitaeru.errors import ModelError
from kitaeru.model.adapt import add_adapter
from kitaeru.recipe.types import LoraSection


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).requires_grad_(False)


def section(**values):
    return LoraSection.model_validate(values)


def trained(adapted):
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def test_all_linear_leaves_the_head_out_and_trains_in_fp32(model):
    adapted = add_adapter(model, section(r=4), 0)
    names = trained(adapted)
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in two blocks
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert all(p.dtype == torch.float32 for p in names.values())
    assert adapted.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_the_start_depends_on_the_seed_alone(tiny_model):
    def fresh(seed):
        torch.rand(3)  # whatever was drawn before
        return trained(add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), section(), seed))

    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(p, again[n]) for n, p in one.items())
    assert not all(torch.equal(p, other[n]) for n, p in one.items())


def test_a_fresh_adapter_changes_nothing(tiny_model):
    ids = torch.arange(4, 20)[None]
    for values in ({}, {"dora": True}, {"rslora": True}, {"init": "gaussian"}, {"init": "pissa"}, {"init": "olora"}):
        plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
        before = plain(ids).logits.detach()
        after = add_adapter(plain, section(r=4, **values), 0).eval()(ids).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_targets_may_be_ends_of_names(model):
    names = trained(add_adapter(model, section(targets=["layers.1.self_attn.q_proj", "down_proj"]), 0))
    assert {n.split(".lora_")[0].rsplit("layers.")[-1] for n in names} == {
        "1.self_attn.q_proj",
        "0.mlp.down_proj",
        "1.mlp.down_proj",
    }


def test_scales_are_the_papers(tiny_model):
    for values, scale in (({}, 32 / 16), ({"rslora": True}, 32 / 4), ({"r": 4, "alpha": 2}, 0.5)):
        adapted = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), section(**values), 0)
        layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(scale)


def test_an_unknown_target_is_refused_with_the_nearest(model):
    with pytest.raises(ModelError, match=r"no layer named q_prj") as caught:
        add_adapter(model, section(targets=["q_prj", "v_proj"]), 0)
    said = str(caught.value)
    assert "Did you mean q_proj?" in said
    assert "down_proj, gate_proj, k_proj" in said
    assert "lm_head" not in said


def test_a_target_that_cannot_be_adapted_is_refused(model):
    with pytest.raises(ModelError, match="does not fit this model"):
        add_adapter(model, section(targets=["input_layernorm"]), 0)
