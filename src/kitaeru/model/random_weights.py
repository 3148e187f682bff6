"""A model folder of a real shape with random weights: speed and memory do not depend on what a model has learnt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kitaeru.files import write_json
from kitaeru.model.bundled import bundled_folder

# One block of random numbers, of a prime length, is laid end to end: drawing billions of them would take minutes.
BLOCK = 16_777_213
SHARD_BYTES = 4 << 30
DEVIATION = 0.02


def write_random(
    config: Mapping[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config, .safetensors files and the packaged tokenizer; a folder that is complete is left as it is.

    `config` is a config.json with its `model_type`. Host memory: one file of `shard_bytes`.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(config)
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    settings.dtype = dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    settings.save_pretrained(folder)
    for file in bundled_folder().glob("*token*"):
        shutil.copy(file, folder)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = total = 0
    for name, tensor in _filled(_outline(model), dtype):
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) >= shard_bytes:
            total, number = total + _save(shard, folder, number, places), number + 1
            shard = {}
    total += _save(shard, folder, number, places)
    write_json(index, {"metadata": {"total_size": total}, "weight_map": places})


def _outline(model: PreTrainedModel) -> dict[str, Tensor]:
    """Names and shapes as published files have them: a mixture's experts each alone."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return dict(revert_weight_conversion(model, state))


def _filled(outline: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    largest = max(tensor.numel() for tensor in outline.values())
    block = torch.empty(min(BLOCK, largest), dtype=torch.float32).normal_(0, DEVIATION, generator=generator).to(dtype)
    start = 0
    for name, shape in outline.items():
        count = shape.numel()
        if shape.dim() < 2:
            yield name, (torch.zeros if name.endswith("bias") else torch.ones)(shape.shape, dtype=dtype)
            continue
        start = (start + 7919) % len(block)
        times = -(-(start + count) // len(block))
        yield name, block.repeat(times)[start : start + count].reshape(shape.shape).clone()


def _save(shard: dict[str, Tensor], folder: Path, number: int, places: dict[str, str]) -> int:
    if not shard:
        return 0
    file = f"model-{number:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    places |= dict.fromkeys(shard, file)
    return sum(tensor.nbytes for tensor in shard.values())
