"""Mixtures whose experts are packed while they are loaded, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from kitaeru.errors import ModelError
from kitaeru.model.adapt import add_adapter, read_adapter
from kitaeru.model.experts import STACKS, PackedExperts, make_room
from kitaeru.model.load import load_model
from kitaeru.parallel.start import hash_frozen
from kitaeru.plan.stored import packs_experts, weight_bytes
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, ModelSection
from kitaeru.shape import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
KINDS: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(
        **SIZES, intermediate_size=192, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=192, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=3
    ),
}
IDS = torch.arange(24).view(2, 12) * 17 % 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(KINDS[kind]).save_pretrained(made[kind])
        return made[kind]

    return get


def load(folder: Path, base: Any, precision: Any = "fp32") -> Any:
    layout = Layout("single", "qlora" if base == "nf4" else "lora", base, precision, "keep", 64, "cpu")
    return load_model(ModelSection(name=str(folder), attention="sdpa"), layout, 0)


def unpacked(model: Any, folder: Path) -> Any:
    """The same model by transformers alone, with the values that the packed weights stand for."""
    whole = load(folder, "none")
    own = dict(whole.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for stack in STACKS:
                own[f"{name}.{stack}"].data.copy_(module.whole(stack))
    return whole


def move(adapter: Any) -> None:
    """Away from B = 0, where an adapter changes nothing."""
    torch.manual_seed(5)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)


def only_experts(model: Any, folder: Path) -> None:
    """Give layers that bitsandbytes packed the values of their 16-bit selves: experts alone are compared."""
    whole = load(folder, "none")
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, whole.get_submodule(name))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_packed_mixture_is_the_unpacked_one(folder: Any, kind: str, base: str, tmp_path: Path) -> None:
    """Logits, loss and the gradient of every adapter, against transformers' experts with PEFT's own adapters."""
    model = load(folder(kind), base)
    only_experts(model, folder(kind))
    whole = unpacked(model, folder(kind))
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    sides = [add_adapter(side, LoraSection(r=4), 0) for side in (model, whole)]
    found: list[dict[str, Tensor]] = []
    for side in sides:
        move(side)
        output = side(input_ids=IDS, labels=IDS)
        output.loss.backward()
        found.append({n: p.grad for n, p in side.named_parameters() if p.requires_grad} | {"logits": output.logits})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert any("experts.base_layer.lora_A" in name for name in ours)
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
    with torch.no_grad():
        apart = sides[0](input_ids=IDS).logits
        with sides[0].disable_adapter(), sides[1].disable_adapter():
            assert torch.allclose(sides[0](input_ids=IDS).logits, sides[1](input_ids=IDS).logits, atol=1e-5)
            assert not torch.allclose(sides[0](input_ids=IDS).logits, apart, atol=1e-3)
    # PEFT alone reads what was written: on the values packed weights stand for, the same model.
    sides[0].save_pretrained(tmp_path)
    plain: Any = PeftModel.from_pretrained(unpacked(load(folder(kind), base), folder(kind)), str(tmp_path))
    assert (plain(input_ids=IDS).logits - apart).norm() <= 1e-5 * apart.norm()
    again = load(folder(kind), base)
    only_experts(again, folder(kind))
    assert torch.equal(read_adapter(again, tmp_path)(input_ids=IDS).logits, apart)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_bytes_are_the_plan_s(folder: Any, base: Any) -> None:
    model = load(folder("mixtral"), base, "bf16")
    shape = ModelShape.from_folder(folder("mixtral"))
    stored = 0
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            stored += sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            assert f"{name}.gate_up_proj" in model.state_dict()
    one = Layout("single", "lora", base, "bf16", "keep", 64, "cpu")
    without = sum(weight_bytes(one, ModelShape(**{**shape.to_dict(), "experts": 0, "intermediate": 0})))
    router = 2 * shape.layers * shape.experts * shape.hidden
    assert stored == sum(weight_bytes(one, shape)) - without - router


def test_every_byte_is_in_the_checksum(folder: Any) -> None:
    model = load(folder("qwen3_moe"), "nf4")
    before = hash_frozen(model)
    module = next(module for module in model.modules() if isinstance(module, PackedExperts))
    for tensor in (module.down_proj, module.get_buffer("gate_up_proj_absmax")):
        raw = tensor.data.view(-1)
        raw[7] ^= 1
        assert hash_frozen(model) != before
        raw[7] ^= 1
    assert hash_frozen(model) == before


def test_what_is_not_recognised_is_left_as_it_is() -> None:
    """gpt-oss has biases and lays gate and up between each other; narrow experts do not fill a block of 64."""
    sizes = {**SIZES, "intermediate_size": 64, "num_local_experts": 4}
    config = GptOssConfig(**sizes, layer_types=["full_attention"] * 2)
    narrow = transformers.MixtralConfig(**{**SIZES, "intermediate_size": 96}, num_local_experts=2)
    for one in (config, narrow):
        with torch.device("meta"):
            assert make_room(AutoModelForCausalLM.from_config(one), "nf4") == 0
        assert not packs_experts("nf4", ModelShape.from_config(one.to_dict()))
    for one in KINDS.values():
        with torch.device("meta"):
            assert make_room(AutoModelForCausalLM.from_config(one), "nf4") == 2
        assert packs_experts("nf4", ModelShape.from_config(one.to_dict()))


def test_merging_into_few_bits_is_refused(folder: Any) -> None:
    tuned: Any = add_adapter(load(folder("mixtral"), "nf4"), LoraSection(r=4), 0)
    with pytest.raises(ModelError, match="few bits"):
        tuned.merge_and_unload()


def test_a_long_answer_step_by_step_is_the_whole_one(folder: Any) -> None:
    """One token at a time, as when text is generated."""
    model = load(folder("mixtral"), "nf4").eval()
    with torch.no_grad():
        made = model.generate(IDS[:1, 1:5], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        whole = model(input_ids=made).logits.argmax(-1)
    assert made[0, 4:].tolist() == whole[0, 3:-1].tolist()


WISHES: list[dict[str, Any]] = [{"init": "pissa"}, {"init": "olora"}, {"dora": True}, {"dropout": 0.1}]


@pytest.mark.parametrize("base", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_experts_take_plain_lora(folder: Any, kind: str, base: Any) -> None:
    """Every way to start that a recipe knows: it works, or says what does not and what to do."""
    ids = torch.arange(4, 20)[None]
    for plain in ({}, {"init": "gaussian"}, {"rslora": True}):
        model = load(folder(kind), base).requires_grad_(False).eval()
        before = model(ids).logits
        torch.testing.assert_close(add_adapter(model, LoraSection(r=4, **plain), 0)(ids).logits, before)
    for wish in WISHES:
        model = load(folder(kind), base).requires_grad_(False).eval()
        with pytest.raises(ModelError, match="stacked") as caught:
            add_adapter(model, LoraSection(r=4, **wish), 0)
        assert next(iter(wish)) in str(caught.value)
        assert "lora.targets=[q_proj" in str(caught.value)
        if base == "none":  # as it says, the attention alone takes all of them
            model = load(folder(kind), base).requires_grad_(False).eval()
            before = model(ids).logits
            adapted = add_adapter(model, LoraSection(r=4, targets=("q_proj", "o_proj"), **wish), 0).eval()
            torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-5)
