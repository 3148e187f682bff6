"""Tiny models of four families, and runs of them on several processes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def crew() -> ModuleType:
    """The module crew.py, under the name by which its processes know it."""
    spec = importlib.util.spec_from_file_location("crew", Path(__file__).with_name("crew.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crew"] = module
    spec.loader.exec_module(module)
    return module


def _config(family: str, layers: int) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 16384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    match family:
        case "llama":
            return transformers.LlamaConfig(**shape, tie_word_embeddings=True)
        case "qwen3":
            return transformers.Qwen3Config(**shape, head_dim=8, tie_word_embeddings=False)
        case "neox":
            del shape["num_key_value_heads"]
            return transformers.GPTNeoXConfig(**shape)
        case "gemma":
            return transformers.GemmaConfig(**shape, head_dim=8)
        case "wide gemma3":  # wide enough for its layers to be fused; each stage has layers of one kind
            wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "sliding_window": 8}
            kinds = ["sliding_attention" if layer % 2 else "full_attention" for layer in range(layers)]
            return transformers.Gemma3TextConfig(**shape | wide, layer_types=kinds)
        case "mixtral":
            return transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
        case "wide mixtral":  # wide enough for its experts to be packed
            wide = {"hidden_size": 64, "intermediate_size": 128}
            return transformers.MixtralConfig(**shape | wide, num_local_experts=4, num_experts_per_tok=2)
        case "wide qwen3_moe":
            wide = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
            return transformers.Qwen3MoeConfig(**shape | wide, num_experts=6, num_experts_per_tok=2)
        case "gpt2":
            return transformers.GPT2Config(vocab_size=16384, n_embd=32, n_layer=layers, n_head=4)
    raise ValueError(family)


@pytest.fixture(scope="session")
def family(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """`family("qwen3")`: the folder of a random tiny model of that family, of two layers or more."""
    made: dict[tuple[str, int], Path] = {}

    def make(name: str, layers: int = 2) -> Path:
        if (name, layers) not in made:
            import torch
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp("families") / name
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(_config(name, layers))
                for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
                    torch.nn.init.normal_(parameter, std=0.02)  # transformers starts them at nought
                model.save_pretrained(folder)
            for file in TOKENIZER_FILES:
                if (tokenizer_folder / file).is_file():
                    shutil.copy(tokenizer_folder / file, folder)
            made[name, layers] = folder
        return made[name, layers]

    return make


@pytest.fixture(scope="session")
def hard(crew: ModuleType, family, chat_data: Path, valid_data: Path):
    """`hard("llama", "lora")`: a run that is hard to get the same, of a model of two layers or more."""

    def make(name: str, method: str, layers: int = 2, **more: Any) -> dict[str, Any]:
        own = {"model": family(name, layers), "data": chat_data, "method": method, "data__valid": str(valid_data)}
        return crew.options_of(name, method) | own | more

    return make


@pytest.fixture(scope="session")
def alone(crew: ModuleType, hard, tmp_path_factory: pytest.TempPathFactory):
    """`alone("llama", "lora")`: what such a run gives on one process."""
    done: dict[Any, Any] = {}

    def get(name: str, method: str, layers: int = 2, **more: Any) -> Any:
        key = (name, method, layers, *sorted(more.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("alone")
            [done[key]] = crew.run(folder, 1, crew.train, folder=folder / "run", **hard(name, method, layers, **more))
        return done[key]

    return get
