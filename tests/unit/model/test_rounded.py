"""Trained linear layers with two of their three products in 8 bits, against the same in 16 and 32."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kitaeru.kernels.rows import Arithmetic, Rows, round_rows
from kitaeru.model.rounded import RoundedSite, round_products

EIGHT: tuple[Arithmetic, ...] = ("fp8", "int8")
# Relative errors of a result: as measured 0.037 and 0.011, of numbers without outliers.
MOST = {"fp8": 0.045, "int8": 0.014}


def apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears(*outputs: int, inputs: int = 192, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Any]:
    made = [nn.Linear(inputs, n, bias=n == outputs[0]) for n in outputs]
    for seed, module in enumerate(made):
        nn.init.normal_(module.weight, std=0.05, generator=torch.Generator().manual_seed(seed))
    return [module.to(device, dtype) for module in made]


def site_of(modules: list[Any], arithmetic: Arithmetic, compute: torch.dtype = torch.float32) -> RoundedSite:
    return RoundedSite(tuple(modules), arithmetic, compute)


def by(site: RoundedSite) -> Any:
    """A site as `passes` calls it."""
    return lambda number, read: site(site.modules[number], read)


def passes(run: Any, modules: list[Any], x: Tensor, ups: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Results, the gradient of x, those of the weights and biases."""
    leaf = x.clone().requires_grad_()
    read = leaf * 1  # as in a model, what is read is a result itself
    results = [run(number, read) for number in range(len(modules))]
    inner = sum((y.float() * up).sum() for y, up in zip(results, ups, strict=True))
    parameters = [p for module in modules for p in module.parameters()]
    dx, *gradients = torch.autograd.grad(inner, [leaf, *parameters])
    return [y.detach() for y in results], dx, gradients


@pytest.mark.parametrize("arithmetic", EIGHT)
def test_outputs_and_gradients_are_near_the_exact_ones(arithmetic: Arithmetic) -> None:
    modules = linears(128, 64, 64)
    x, ups = draw(2, 37, 192, seed=7), [draw(2, 37, n, seed=i) for i, n in enumerate((128, 64, 64))]
    exact_y, exact_dx, exact_dw = passes(lambda i, read: modules[i](read), modules, x, ups)
    site = site_of(modules, arithmetic)
    y, dx, dw = passes(by(site), modules, x, ups)
    for ours, theirs in zip([*y, dx], [*exact_y, exact_dx], strict=True):
        assert 1e-3 < apart(ours, theirs) < MOST[arithmetic]
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999
    # With the same x and dy the weights' own gradients are what they are in 16 bits.
    assert max(apart(ours, theirs) for ours, theirs in zip(dw, exact_dw, strict=True)) < 1e-6
    assert site._read is None


@pytest.mark.parametrize("arithmetic", EIGHT)
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
def test_masters_in_32_bits_and_weights_in_16(arithmetic: Arithmetic, width: torch.dtype) -> None:
    """Under autocast: results in 16 bits, each gradient in the width of what it is of, and for the weights the very
    numbers of 16-bit training.
    """
    modules = linears(128, 64, dtype=width)
    x, ups = draw(40, 192, seed=7).to(width), [draw(40, n, seed=n) for n in (128, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        plain_y, plain_dx, plain_dw = passes(lambda i, read: modules[i](read), modules, x, ups)
        y, dx, dw = passes(by(site_of(modules, arithmetic, torch.bfloat16)), modules, x, ups)
    assert {t.dtype for t in y} == {torch.bfloat16}
    assert dx.dtype == width
    assert {t.dtype for t in dw} == {width}
    for ours, theirs in zip([*y, dx], [*plain_y, plain_dx], strict=True):
        assert apart(ours, theirs) < MOST[arithmetic] + 0.003
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dw, plain_dw, strict=True))


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of everything that is rounded."""
    seen: list[tuple[int, ...]] = []

    def see(values: Tensor, dtype: torch.dtype) -> Rows:
        seen.append(tuple(values.shape))
        return round_rows(values, dtype)

    monkeypatch.setattr("kitaeru.model.rounded.round_rows", see)
    return seen


def test_what_several_read_is_rounded_once(roundings: list[tuple[int, ...]]) -> None:
    modules = linears(128, 64, 64)
    site = site_of(modules, "fp8")
    x = draw(10, 192, seed=1)
    for _ in range(2):
        for module in modules:
            site(module, x)
    assert roundings.count((10, 192)) == 2
    other = x.clone()
    site(modules[0], x)
    site(modules[1], other)  # another tensor is never taken for it
    assert roundings.count((10, 192)) == 4


def model_of(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def gradients_of(model: LlamaForCausalLM) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    ids = torch.randint(4, 300, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arithmetic", EIGHT)
def test_a_whole_model(arithmetic: Arithmetic) -> None:
    """Loss, and gradients of all weights, near those of 16 bits; recomputation changes nothing."""
    model = model_of(num_key_value_heads=4)
    loss, exact = gradients_of(model)
    layers = round_products(model, arithmetic, torch.bfloat16)
    assert [set(layer.sites) for layer in layers] == [{"qkv", "out", "both", "down"}] * 2
    assert all(layer.in_8_bits for layer in layers)
    ours, gradients = gradients_of(model)
    assert ours == pytest.approx(loss, rel=1e-3)
    assert gradients.keys() == exact.keys()
    flat, flat_exact = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, exact))
    assert 1e-3 < apart(flat, flat_exact) < {"fp8": 0.08, "int8": 0.03}[arithmetic]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, others = gradients_of(model.train())
    assert again == ours
    assert all(torch.equal(others[name], gradients[name]) for name in gradients)
    assert all(site._read is None for layer in layers for site in layer.sites.values())


def test_only_what_is_known_is_taken() -> None:
    class Other(nn.Linear):
        pass

    model: Any = model_of(num_key_value_heads=2)  # k and v have 32 rows: none that INT8 turns
    model.model.layers[0].mlp.down_proj.__class__ = Other
    model.model.layers[1].mlp.down_proj.requires_grad_(False)
    layers = round_products(model, "int8", torch.bfloat16)
    kinds = [{name: site.arithmetic for name, site in layer.sites.items()} for layer in layers]
    assert kinds == [{"qkv": "16bit", "out": "int8", "both": "int8"}] * 2
    for layer in layers:
        layer.on = False
    assert gradients_of(model)[0] == gradients_of(model_of())[0]
    assert "forward" not in vars(model.lm_head)


def test_a_site_that_is_widened_computes_in_16_bits() -> None:
    model = model_of(num_key_value_heads=4)
    exact = gradients_of(model)
    layers = round_products(model, "fp8", torch.bfloat16)
    gradients_of(model)
    for layer, name in itertools.product(layers, ("down", "qkv", "both", "out")):
        assert layer.in_8_bits
        layer.widen(name)
    assert not any(layer.in_8_bits for layer in layers)
    loss, gradients = gradients_of(model)
    assert loss == exact[0]
    assert all(torch.equal(gradients[name], exact[1][name]) for name in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", EIGHT)
@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_kernels_compute_what_the_reference_does(arithmetic: Arithmetic, tokens: int) -> None:
    if arithmetic == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8")
    modules = linears(256, 128, 128, inputs=320)
    x, ups = draw(tokens, 320, seed=7), [draw(tokens, n, seed=i) for i, n in enumerate((256, 128, 128))]
    expected = passes(by(site_of(modules, arithmetic, torch.bfloat16)), modules, x, ups)
    moved = [copy.deepcopy(module).cuda() for module in modules]
    with torch.autocast("cuda", torch.bfloat16):
        site = site_of(moved, arithmetic, torch.bfloat16)
        for _ in range(2):
            y, dx, dw = passes(by(site), moved, x.cuda(), [up.cuda() for up in ups])
    for ours, theirs in zip([*y, dx, *dw], [*expected[0], expected[1], *expected[2]], strict=True):
        assert ours.dtype == theirs.dtype
        assert apart(ours.cpu(), theirs) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", EIGHT)
def test_a_whole_model_on_a_gpu(arithmetic: Arithmetic) -> None:
    if arithmetic == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8")
    model: Any = model_of(hidden_size=256, intermediate_size=512, num_key_value_heads=4).cuda()
    ids = torch.randint(4, 300, (1, 256), generator=torch.Generator().manual_seed(3)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    exact: Any = copy.deepcopy(model)
    theirs = torch.optim.AdamW(exact.parameters(), lr=1e-3, fused=True)
    assert round_products(model, arithmetic, torch.bfloat16)
    losses: list[tuple[float, ...]] = []
    for _ in range(20):
        now = []
        for each, steps in ((model, optimizer), (exact, theirs)):
            with torch.autocast("cuda", torch.bfloat16):
                loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            now.append(float(loss))
        losses.append(tuple(now))
    assert losses[-1][0] < 0.5 * losses[0][0]
    # Random tokens are learnt by heart: near the end there is little loss left to compare with.
    apart = max(abs(ours - wanted) for ours, wanted in losses) / losses[0][1]
    assert apart < 0.03, losses
