"""Micro-batches that are filled up, and replayed as CUDA graphs: the same training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.data.batches import MicroBatches, micro_batches
from kitaeru.data.corpus import Corpus
from kitaeru.kernels import flex
from kitaeru.kernels.rows import Arithmetic
from kitaeru.model import attention
from kitaeru.model.fused import fuse
from kitaeru.model.head import chunked_loss, forward_arguments
from kitaeru.parallel import single
from kitaeru.parallel.graphs import Replays
from kitaeru.parallel.types import Held, Unit, Work
from kitaeru.parallel.world import World

VOCABULARY = 500


def corpus(lengths: Sequence[int], seed: int) -> Corpus:
    random, total = np.random.default_rng(seed), sum(lengths)
    offsets = np.cumsum([0, *lengths])
    trained = random.random(total) < 0.5
    trained[offsets[:-1]] = False
    return Corpus(
        tokens=random.integers(3, VOCABULARY, total, dtype=np.int32),
        trained=trained,
        offsets=offsets,
        files=("a.jsonl",),
        file_index=np.zeros(len(lengths), np.int32),
        rows=np.arange(1, len(lengths) + 1),
        sources=np.zeros(len(lengths), np.int32),
        weights=(1.0,),
    )


def batches_of(lengths: Sequence[int], seed: int = 0, *, filled: bool = True) -> MicroBatches:
    return micro_batches(corpus(lengths, seed), range(len(lengths)), micro_batch_tokens=256, filled=filled)


def unit(device: str, dtype: torch.dtype, arithmetic: Arithmetic | None, kind: str = "llama") -> tuple[Unit, list[Any]]:
    attention.register()
    torch.manual_seed(0)
    more: dict[str, Any] = {"head_dim": 64, "sliding_window": 50} if kind == "gemma2" else {}
    config = AutoConfig.for_model(
        kind, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512, attn_implementation=attention.NAME,
        **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.requires_grad_(False)
    whole = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).to(device)
    for name, parameter in whole.named_parameters():
        if "lora" in name:
            parameter.data = 0.05 * torch.randn_like(parameter, dtype=torch.float32)
    if arithmetic is not None:
        row = batches_of([64, 64], filled=False)[0].to(torch.device(device))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            done = fuse(model, arithmetic, keep8=False, probe=lambda: model.model(**forward_arguments(row)))
        assert len(done.layers) == 3, done.why_not
    made = Unit(whole)
    made.loss_sum = chunked_loss(model)
    return made, [(name, p) for name, p in whole.named_parameters() if p.requires_grad]


def step(held: Held, batches: MicroBatches, device: str) -> dict[int, torch.Tensor]:
    """The gradients of a global batch."""
    trained = batches.trained_tokens
    work = Work(
        range(len(batches)),
        batches.tokens,
        lambda number, where: batches[number or 0].to(where),
        lambda _: None,
        lambda: torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext(),
        lambda loss: loss / trained,
        lambda loss: loss,
    )
    return single.gradients(held, work)


@pytest.mark.parametrize("lengths", [[100, 100, 30], [250, 3], [64, 64, 64, 64], [5]])
def test_a_row_that_is_filled_up_trains_the_same(lengths: list[int]) -> None:
    made, named = unit("cpu", torch.float32, None)
    held, found = Held(World(), made, named), []
    for filled in (False, True):
        shares = step(held, batches_of(lengths, filled=filled), "cpu")
        found.append([*shares.values(), *(p.grad for _, p in named)])
        made.zero_grad()
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


# A step's micro-batches: examples of one length, of several, and in the last one few tokens.
STEPS = [[64] * 8 + [200, 30, 100], [64] * 8 + [190, 40, 90], [64] * 8 + [210, 20, 110], [33, 90, 12, 88], [30, 91, 17]]


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["16bit", "fp8", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_is_replayed_trains_the_same(arithmetic: Arithmetic, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With capped scores the blocks that FlexAttention skips are found anew in every replay."""
    monkeypatch.setattr(flex, "tiles", "flex")
    ends, counts = [], []
    for graphs in (False, True):
        made, named = unit("cuda", torch.bfloat16, arithmetic, kind)
        held = Held(World(), made, named, replays=Replays(named) if graphs else None)
        optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3, fused=True)
        losses = []
        for seed, lengths in enumerate(STEPS * 2):
            shares = step(held, batches_of(lengths, seed), "cuda")
            losses.append(torch.stack(list(shares.values())))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if held.replays is not None:
            assert held.replays.excuse() is None
            counts = [len(held.replays._captured)]
            held.replays.drop()
            assert not held.replays._captured
        ends.append((torch.cat(losses), torch.cat([p.detach().flatten() for _, p in named])))
    (loss, weights), (replayed, replayed_weights) = ends
    assert counts[0] >= 3
    torch.testing.assert_close(replayed, loss, rtol=2e-3, atol=1e-4)
    assert float((replayed_weights - weights).norm() / weights.norm()) < 5e-3


@pytest.mark.gpu
def test_where_a_graph_cannot_be_the_kernels_are_launched_and_it_is_said_why() -> None:
    made, named = unit("cuda", torch.bfloat16, "16bit")
    original = made.loss_sum
    made.loss_sum = lambda batch: original(batch) * (1.0 if float(batch.input_ids.sum()) > 0 else 0.0)  # waits
    held = Held(World(), made, named, replays=Replays(named))
    assert held.replays is not None
    batches = batches_of([64] * 4)
    first = step(held, batches, "cuda")[0]
    expected = [p.grad.clone() for _, p in named]
    made.zero_grad()
    second = step(held, batches, "cuda")[0]
    assert held.replays.excuse() is not None
    assert held.replays.excuse() is None
    assert float(first) == pytest.approx(float(second), rel=1e-3)
    for (_, parameter), theirs in zip(named, expected, strict=True):
        assert float((parameter.grad - theirs).norm()) <= 0.02 * float(theirs.norm())
