"""Layers that come from disk one at a time: the same numbers to the bit, and the memory of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from kitaeru.data.types import MicroBatch
from kitaeru.errors import ModelError
from kitaeru.model.adapt import add_adapter
from kitaeru.model.experts import PackedExperts
from kitaeru.model.head import plain_loss
from kitaeru.model.load import load_model
from kitaeru.model.stream import load_streamed
from kitaeru.plan.types import Base, Layout
from kitaeru.recipe.types import LoraSection, ModelSection

CPU = torch.device("cpu")


def batch() -> MicroBatch:
    ids = torch.randint(4, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(12)] * 2)[None]
    return MicroBatch(ids, positions, ids.roll(-1, 1), torch.tensor([0, 12, 24], dtype=torch.int32), 12)


def step(model: Any, dropout: float = 0.2) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of an adapter on `model`."""
    model.config.use_cache = False
    model.requires_grad_(False)
    adapted = add_adapter(model, LoraSection(r=4, dropout=dropout), seed=0)
    adapted.train()
    torch.manual_seed(1)
    loss = plain_loss(model)(batch())
    loss.backward()
    return float(loss), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_the_same_numbers_as_in_memory(base: Base, tiny_model: Path, tmp_path: Path) -> None:
    section = ModelSection(name=str(tiny_model))
    wanted, gradients = step(load_model(section, Layout("single", "lora", base, "fp32", "keep", 64, "cpu"), 0))
    for _ in range(2):  # written, and found
        model = load_streamed(section, base=base, precision="fp32", device=CPU, folder=tmp_path)
        loss, found = step(model)
        assert loss == wanted
        assert all(found[name].equal(gradient) for name, gradient in gradients.items())
        layers = model.model.layers.parameters()
        held = sum(p.numel() for p in layers if not p.requires_grad)
        assert held == 0, "a layer's weights are still there after its turn"
    assert len(list(tmp_path.glob("*/layer-*.safetensors"))) == 2


def test_packed_experts_come_from_disk_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 3}
    config = MixtralConfig(vocab_size=1024, num_attention_heads=4, num_key_value_heads=2, sliding_window=None, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    section = ModelSection(name=str(tmp_path / "model"))
    wanted, gradients = step(load_model(section, Layout("single", "qlora", "nf4", "fp32", "keep", 64, "cpu"), 0), 0.0)
    for _ in range(2):  # written, and found
        model = load_streamed(section, base="nf4", precision="fp32", device=CPU, folder=tmp_path / "layers")
        loss, found = step(model, 0.0)
        assert loss == pytest.approx(wanted, rel=1e-6)
        assert any("experts" in name for name in found)
        assert all(found[name].allclose(gradient, atol=1e-7) for name, gradient in gradients.items())
        experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
        assert len(experts) == 2
        assert sum(t.numel() for e in experts for t in (*e.parameters(), *e.buffers())) == 0
    whole = 2 * 3 * 3 * 64 * 128 * 2
    assert sum(file.stat().st_size for file in (tmp_path / "layers").glob("*/layer-*")) < 0.6 * whole


def test_a_layer_is_there_only_for_its_turn(tiny_model: Path, tmp_path: Path) -> None:
    model = load_streamed(
        ModelSection(name=str(tiny_model)), base="none", precision="fp32", device=CPU, folder=tmp_path
    )
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append([sum(p.numel() for p in layer.parameters()) for layer in model.model.layers])

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        plain_loss(model)(batch())
    (first, none), (nothing, second) = seen
    assert (none, nothing) == (0, 0)
    assert first == second > 30_000


def test_a_folder_without_its_index_is_made_anew_and_one_that_is_damaged_says_so(
    tiny_model: Path, tmp_path: Path
) -> None:
    section = ModelSection(name=str(tiny_model))

    def load() -> Any:
        return load_streamed(section, base="none", precision="fp32", device=CPU, folder=tmp_path)

    (index,) = (load(), list(tmp_path.glob("*/index.json")))[1]
    layer = index.parent / "layer-0000.safetensors"
    whole = layer.read_bytes()
    layer.write_bytes(whole[:100])
    with pytest.raises(ModelError, match="cannot be read") as caught:
        plain_loss(load())(batch())
    assert caught.value.where == str(layer)
    index.unlink()  # as when writing was cut short
    load()
    assert layer.read_bytes() == whole


def test_a_model_whose_layers_are_not_known(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitaeru.model.stream.layers_of", lambda model: None)
    with pytest.raises(ModelError, match="stand alone"):
        load_streamed(ModelSection(name=str(tiny_model)), base="none", precision="fp32", device=CPU, folder=tmp_path)
