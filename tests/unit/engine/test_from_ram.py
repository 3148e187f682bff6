"""Full training from RAM on one device: what is planned is looked for first, and it is the plain training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kitaeru.engine import build as building
from kitaeru.engine.result import write_result
from kitaeru.errors import TrainingError
from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import make_plan
from kitaeru.shape import find_shape

FROM_RAM = {"variant": "offload", "activations": "recompute"}


def test_too_little_ram_is_an_error_before_anything_is_loaded(training, tiny_model, chat_data, tmp_path, monkeypatch):
    model = "elyza/Llama-3-ELYZA-JP-8B"
    wish = training.make_recipe(tiny_model, chat_data, "full")
    planned = make_plan(wish, parse_gpus("RTX A5000", "128GB"), find_shape(model))
    assert planned.layout.way == "single-offload"
    monkeypatch.setattr(building, "host_memory", lambda: (128 * 10**9, 90 * 10**9))
    run = training.Training(tmp_path, tiny_model, chat_data, "full", **FROM_RAM)
    run.trainee.plan = replace(planned, recipe=wish)
    with pytest.raises(TrainingError, match=r"10\d GB are needed, 90 GB are there") as caught:
        building.load(run.trainee)
    assert "gradients" in str(caught.value.where)
    monkeypatch.setattr(building, "host_memory", lambda: (128 * 10**9, 110 * 10**9))
    building.load(run.trainee)


def test_under_autocast_it_is_the_plain_training_bit_for_bit(training, tiny_model, chat_data, tmp_path):
    """Weights are cast on arrival as autocast casts them, and 16-bit gradients are added up in 32 bits."""
    options = {"precision": "bf16", "train__max_grad_norm": 100.0, "micro_batch_tokens": 64}
    plain = training.Training(tmp_path / "a", tiny_model, chat_data, "full", activations="recompute", **options)
    ours = training.Training(tmp_path / "b", tiny_model, chat_data, "full", **FROM_RAM, **options)
    assert plain.run() == ours.run() == "finished"
    assert plain.losses == ours.losses
    weights = ours.weights()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.weights().items())
    layer = ours.trainee.causal_lm.model.layers[0]
    assert layer.mlp.up_proj.weight.untyped_storage().nbytes() <= 4  # nothing of it is on the device between passes

    for run in (plain, ours):
        run.trainee.optimizer.state.clear()
        write_result(run.trainee, run.folder)
    files = [(run.folder / "model" / "model.safetensors").read_bytes() for run in (plain, ours)]
    assert files[0] == files[1]
    assert ours.loop.evaluate(ours.data.train)[0] == plain.loop.evaluate(plain.data.train)[0]
