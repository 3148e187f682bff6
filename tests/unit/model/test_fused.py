"""The fused layer is the layer: PEFT's own numbers and gradients, exactly in full width and nearly in 8 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.kernels.packed_attention import attend, attend_backward, packed_attention_reference
from kitaeru.kernels.rows import Arithmetic
from kitaeru.model import attention, fused
from kitaeru.model.fused import FusedLayer, fuse, fused_layer, install
from kitaeru.model.site import UnfitError

LENGTHS = (7, 12, 5)
TOKENS = sum(LENGTHS)
# Windows are shorter than the examples; caps, scales and the two bases of Gemma 3's rotation are far from the usual.
GEMMA = {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 20}
MORE: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 6},
    "gemma": {"head_dim": 32},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 1.5},
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
    },
}
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def adapted(kind: str, dtype: torch.dtype = torch.float32, *, kv_heads: int = 2, **lora: Any) -> tuple[Any, Any]:
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=160, max_position_embeddings=256, **MORE.get(kind, {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    if "post_feedforward_layernorm" in dict(model.model.layers[0].named_children()):
        # What these layers add is normed: as in trained ones, the stream is to be larger.
        model.get_input_embeddings().weight.data.mul_(10)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.requires_grad_(False)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    whole = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter_name, parameter in whole.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return model, whole


def given() -> dict[str, Any]:
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None], "use_cache": False,
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
    }  # fmt: skip


def run(model: Any, whole: Any, *, frozen_input: bool = False) -> dict[str, Tensor]:
    """Output, input gradient and every adapter gradient of one packed micro-batch."""
    whole.zero_grad()
    ids = torch.randint(0, 160, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(not frozen_input)
    output = model.model(inputs_embeds=embedded, **given()).last_hidden_state
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    inputs = {} if frozen_input else {"input": embedded.grad.clone()}
    return {"output": output.detach(), **inputs, **found}


def put_on(model: Any, arithmetic: Arithmetic, change: Callable[[FusedLayer], None] = lambda _: None) -> None:
    for layer in model.model.layers:
        made = fused_layer(layer, model.config, arithmetic, torch.float32)
        change(made)
        install(layer, made)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_in_full_width_it_is_pefts_layer(kind: str, recompute: bool) -> None:
    """With the model's own attention and masks, whose windows and caps change the numbers."""
    model, whole = adapted(kind)
    model.set_attn_implementation("eager")
    expected = run(model, whole)
    if kind in ("mistral", "gemma2", "gemma3_text"):
        model.config.sliding_window, window = 256, model.config.sliding_window
        assert apart(run(model, whole)["output"], expected["output"]) > 0.01
        model.config.sliding_window = window
    put_on(model, "16bit", lambda layer: setattr(layer, "recompute", recompute))
    got = run(model, whole)
    assert got.keys() == expected.keys()
    assert len(got) == 2 + 2 * 2 * 7
    for name in expected:
        assert apart(got[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("arithmetic", ["16bit", "fp8", "int8"])
def test_an_mlp_in_pieces_is_the_same(arithmetic: Arithmetic, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows know nothing of each other: only sums over tokens are added in another order."""
    model, whole = adapted(kind)
    put_on(model, arithmetic, lambda layer: setattr(layer, "recompute", True))
    expected = run(model, whole)
    monkeypatch.setattr(fused, "MLP_TOKENS", 10)
    seen: list[int] = []
    gated = fused.gated
    monkeypatch.setattr(fused, "gated", lambda both, *rest: (seen.append(len(both)), gated(both, *rest))[1])
    got = run(model, whole)
    assert seen == [10, 10, 4] * 4  # two layers, forward and again
    assert got.keys() == expected.keys()
    for name in expected:
        assert apart(got[name], expected[name]) < 1e-6, name


def test_a_long_row_s_last_norm_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = adapted("llama")
    monkeypatch.setattr(fused, "MLP_TOKENS", 10)
    expected = run(model, whole)
    ids = torch.randint(0, 160, (1, TOKENS))
    done = fuse(model, "16bit", keep8=False, recompute=2, probe=lambda: model.model(input_ids=ids, **given()))
    assert [layer.recompute for layer in done.layers] == [True, True]
    kept: list[tuple[int, ...]] = []
    norm = model.model.norm

    def see(_: Any, arguments: tuple[Tensor]) -> None:
        arguments[0].register_hook(lambda gradient: kept.append(tuple(gradient.shape)))

    norm.register_forward_pre_hook(see)
    got = run(model, whole)
    assert kept == [(1, TOKENS, 128)]
    assert all(apart(got[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@pytest.mark.parametrize("keep8", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_in_8_bits_it_is_near(kind: str, arithmetic: Arithmetic, keep8: bool) -> None:
    model, whole = adapted(kind)
    expected = run(model, whole)
    put_on(model, arithmetic, lambda layer: setattr(layer, "keep", arithmetic if keep8 else "16bit"))
    got = run(model, whole)
    bound = {"fp8": 0.15 if kind == "llama" else 0.2, "int8": 0.05}[arithmetic]
    assert apart(got["output"], expected["output"]) < bound
    assert apart(got["input"], expected["input"]) < bound
    ours, theirs = (torch.cat([run_of[n].flatten() for n in expected if "lora" in n]) for run_of in (got, expected))
    assert float(torch.cosine_similarity(ours.double(), theirs.double(), 0)) > (0.98 if arithmetic == "fp8" else 0.997)


def test_int8_with_a_side_that_is_not_of_64_is_computed_in_16_bits() -> None:
    """One key/value head of 32: q, k and v cannot be turned along their outputs; the others can."""
    model, whole = adapted("llama", kv_heads=1)
    expected = run(model, whole)
    layer = fused_layer(model.model.layers[0], model.config, "int8", torch.float32)
    assert [s.arithmetic for s in (layer.qkv, layer.out, layer.both, layer.down)] == ["16bit", *["int8"] * 3]
    put_on(model, "int8")
    assert apart(run(model, whole)["output"], expected["output"]) < 0.05


def test_adapters_on_some_layers_only() -> None:
    model, whole = adapted("llama", target_modules=["v_proj", "down_proj"])
    expected = run(model, whole)
    put_on(model, "16bit")
    got = run(model, whole)
    assert len(got) == 2 + 2 * 2 * 2
    assert all(apart(got[name], expected[name]) < 1e-5 for name in expected)


def test_the_first_layer_needs_no_gradient_of_its_input() -> None:
    model, whole = adapted("llama")
    expected = run(model, whole, frozen_input=True)
    put_on(model, "16bit")
    got = run(model, whole, frozen_input=True)
    assert all(apart(got[name], expected[name]) < 1e-5 for name in expected)


def test_an_optimizer_step_is_seen() -> None:
    """A fused optimizer tells no version counter: a stale copy of the adapter would train on nothing."""
    model, whole = adapted("llama")
    put_on(model, "16bit")
    before = run(model, whole)["output"]
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.1, fused=True)
    optimizer.step()
    after = run(model, whole)["output"]
    for layer in model.model.layers:
        del layer.forward
    assert apart(before, after) > 0.01
    assert apart(after, run(model, whole)["output"]) < 1e-5


def test_generation_goes_the_old_way() -> None:
    model, whole = adapted("llama")
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7]])
    expected = whole.generate(input_ids=ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    put_on(model, "16bit")
    got = whole.generate(input_ids=ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "lora", "said"),
    [
        ("olmo2", {}, "without input_layernorm"),
        ("llama", {"lora_dropout": 0.1}, "dropout"),
        ("llama", {"use_dora": True}, "plain LoRA"),
        ("llama", {"modules_to_save": ["input_layernorm"]}, "that is trained|epsilon"),
    ],
)
def test_what_does_not_fit_is_left_as_it_is(kind: str, lora: dict[str, Any], said: str) -> None:
    model, _whole = adapted(kind, **lora)
    with pytest.raises(UnfitError, match=said):
        fused_layer(model.model.layers[0], model.config, "16bit", torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()), "the activation GELU"),  # the exact one
        (
            lambda layer: setattr(layer, "post_feedforward_layernorm", torch.nn.LayerNorm(128, 1e-6)),
            "a norm of another kind",
        ),
        (lambda layer: setattr(layer.post_attention_layernorm, "eps", 1e-3), "two norms of different kinds"),
        (lambda layer: setattr(layer, "router", torch.nn.Identity()), "a part called router"),
    ],
)
def test_a_part_that_computes_something_else_is_seen(change: Callable[[Any], None], said: str) -> None:
    model, _whole = adapted("gemma2")
    change(model.model.layers[0].requires_grad_(False))
    model.requires_grad_(False)
    with pytest.raises(UnfitError, match=said):
        fused_layer(model.model.layers[0], model.config, "16bit", torch.float32)


def test_a_norm_s_weight_is_what_it_multiplies_by() -> None:
    """As it comes, and 1 more, in 32 bits, where it counts from 1; Gemma's are all 0 at first."""
    for kind, more in (("llama", 0.0), ("gemma3_text", 1.0)):
        model, _whole = adapted(kind, torch.bfloat16)
        norm = model.model.layers[0].input_layernorm
        for _ in range(2):
            assert torch.equal(fused._weight(norm).float(), norm.weight.float() + more)
            norm.weight.data.zero_()


def test_fuse_compares_before_it_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _whole = adapted("llama")
    ids = torch.randint(0, 160, (1, TOKENS), generator=torch.Generator().manual_seed(3))

    def probe() -> None:
        model.model(input_ids=ids, **given())

    done = fuse(model, "16bit", keep8=False, probe=probe)
    assert done.why_not is None
    assert [layer.qkv.arithmetic for layer in done.layers] == ["16bit", "16bit"]
    for layer in model.model.layers:
        del layer.forward
    # A layer that computes something else (here: another scale of attention) is found and nothing is left behind.
    monkeypatch.setattr(model.model.layers[1].self_attn, "scaling", 0.5)
    made = fused_layer(model.model.layers[1], model.config, "16bit", torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("kitaeru.model.fused.fused_layer", lambda *_: made)
    done = fuse(model, "16bit", keep8=False, probe=probe)
    assert done.why_not is not None
    assert "off by" in done.why_not
    assert all("forward" not in vars(layer) or layer.forward.__name__ == "forward" for layer in model.model.layers)


def test_a_gradient_that_is_not_finite_is_not_near(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("llama")
    ids = torch.randint(0, 160, (1, TOKENS), generator=torch.Generator().manual_seed(3))

    def broken(upstream: Tensor, done: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = attend_backward(upstream, done)
        return dq, dk, dv * float("nan")

    monkeypatch.setattr("kitaeru.model.fused.attend_backward", broken)
    done = fuse(model, "16bit", keep8=False, probe=lambda: model.model(input_ids=ids, **given()))
    assert done.why_not is not None
    assert done.layers == ()


def test_a_layer_that_8_bits_hurt_is_computed_in_16() -> None:
    model, _whole = adapted("llama")
    with torch.no_grad():  # an outlier in every row of one layer's input: INT8 has a step for it alone
        model.model.layers[1].input_layernorm.weight[3] = 3000.0
        model.model.layers[1].self_attn.q_proj.base_layer.weight[:, 3] = 0
        model.model.layers[1].self_attn.k_proj.base_layer.weight[:, 3] = 0
        model.model.layers[1].self_attn.v_proj.base_layer.weight[:, 3] = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[1].self_attn, name).lora_A["default"].weight[:, 3] = 0
    ids = torch.randint(0, 160, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    done = fuse(model, "int8", keep8=True, probe=lambda: model.model(input_ids=ids, **given()))
    assert [layer.qkv.arithmetic for layer in done.layers] == ["int8", "16bit"]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(128, 128, 128), (65, 3, 200)])
@pytest.mark.parametrize("size", [64, 128])
def test_attention_with_its_passes_apart(lengths: tuple[int, ...], size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, starts = sum(lengths), torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).cuda()
    qkv = torch.randn(tokens, 12 * size, generator=generator).cuda().bfloat16()
    q, k, v = (t.view(tokens, -1, size) for t in qkv.split([8 * size, 2 * size, 2 * size], 1))
    up = torch.randn(tokens, 8, size, generator=generator).cuda().bfloat16()
    done = attend(q, k, v, starts, max(lengths), 0.1)
    got = (done.output, *attend_backward(up, done))
    leaves = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = packed_attention_reference(*(t.transpose(0, 1)[None] for t in leaves), starts, 0.1)[0].transpose(0, 1)
    theirs = (expected, *torch.autograd.grad(expected, leaves, up.float()))
    for ours, exact in zip(got, theirs, strict=True):
        assert apart(ours, exact) < 0.02
