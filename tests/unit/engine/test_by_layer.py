"""What is done with activations, layer by layer, changes where numbers lie and never what they are."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig, MixtralConfig, Qwen3Config

from kitaeru.model.fused import FusedLayer
from kitaeru.model.offload import Host

LAYERS = 3
SIZE: dict[str, Any] = {
    "vocab_size": 16384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "gemma": GemmaConfig(**SIZE),
    "gemma2": Gemma2Config(
        **(SIZE | {"num_key_value_heads": 4}),  # INT8 takes sides of 64
        sliding_window=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
DROPOUT: dict[str, Any] = {"lora__dropout": 0.3}
CASES = {
    "llama with dropout": ("llama", DROPOUT),
    "gemma, all trained": ("gemma", {"method": "full"}),
    "mixtral": ("mixtral", {}),
    "llama, fused": ("llama", {"arithmetic": "16bit"}),
    "qwen3, fused, 4 bits": ("qwen3", {"arithmetic": "16bit", "method": "qlora"}),
    "gemma2, fused, 4 bits": ("gemma2", {"arithmetic": "16bit", "method": "qlora"}),
}
# What is done, and how often each layer's attention is computed in a forward and a backward pass.
POLICIES = {
    "some": ({"recomputed": 2}, (2, 2, 1), 0),
    "all": ({"activations": "recompute"}, (2, 2, 2), 0),
    "in the host's memory": ({"activations": "offload"}, (2, 2, 2), LAYERS - 1),
}


@pytest.fixture(scope="module")
def make(training, chat_data, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by-layer")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)

    def one(family: str, **options: Any) -> Any:
        method = options.pop("method", "lora")
        made = training.Training(
            folder / "run", folder / family, chat_data, method, model__tokenizer=str(tiny_model), **options
        )
        with torch.no_grad():  # an adapter starts with B = 0, and half of it would have no gradient
            for name, parameter in made.trainee.named:
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
        return made

    return one


def gradients(made: Any) -> dict[str, torch.Tensor]:
    batches = made.loop._split(made.loop.sampler.next())
    losses = made.loop._together(made.loop._gradients(batches, batches.trained_tokens, 0), len(batches))
    assert len(losses) > 1
    return {"losses": losses, **{name: p.grad.clone() for name, p in made.trainee.named if p.grad is not None}}


@pytest.fixture(scope="module")
def kept(make):
    done: dict[str, dict[str, torch.Tensor]] = {}

    def get(case: str) -> dict[str, torch.Tensor]:
        if case not in done:
            family, options = CASES[case]
            done[case] = gradients(make(family, **options))
        return done[case]

    return get


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_keeping_everything(
    case: str, policy: str, make: Any, kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = CASES[case]
    changes, times, away = POLICIES[policy]
    expected, made = kept(case), make(family, **options, **changes)
    computed: Counter[int] = Counter()
    for at, layer in enumerate(made.trainee.causal_lm.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda _, __, at=at: computed.update([at]))
    of_fused = {id(layer): index for index, layer in enumerate(made.trainee.fused)}
    attend, put, hosts = FusedLayer.attend, Host.put, set()

    def attended(layer: FusedLayer, *arguments: Any) -> Any:
        computed.update([of_fused[id(layer)]])
        return attend(layer, *arguments)

    def putting(host: Host, tensor: torch.Tensor) -> Any:
        hosts.add(host)
        return put(host, tensor)

    monkeypatch.setattr(FusedLayer, "attend", attended)
    monkeypatch.setattr(Host, "put", putting)
    got = gradients(made)
    micro_batches = len(got["losses"])
    assert tuple(computed[index] / micro_batches for index in range(LAYERS)) == times
    assert [len(host.pieces) for host in hosts] == ([away] if away else [])
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=told)


@pytest.mark.parametrize("arithmetic", ["16bit", "int8"])
def test_gemma_2_is_trained_fused_as_by_its_own_code(make: Any, arithmetic: str) -> None:
    """Packed examples longer than the window, capped scores and capped logits, by the engine: the loss in chunks."""
    plain, fused = (make("gemma2", arithmetic=kind) for kind in ("plain", arithmetic))
    assert (len(plain.trainee.fused), len(fused.trainee.fused)) == (0, LAYERS)
    for made in (plain, fused):
        assert made.run() == "finished"
        assert made.notices == []
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5 if arithmetic == "16bit" else 5e-3)


def test_a_run_is_trained_the_same(make: Any) -> None:
    runs = [make("llama", **DROPOUT, **changes) for changes in ({}, {"recomputed": 1}, {"activations": "offload"})]
    for made in runs:
        assert made.run() == "finished"
    for made in runs[1:]:
        assert made.losses == pytest.approx(runs[0].losses, rel=1e-6)
        assert made.notices == runs[0].notices
