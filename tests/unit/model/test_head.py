"""Which output heads the chunked loss is right for."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kitaeru.data.types import MicroBatch
from kitaeru.model.head import distance, forward_arguments, recognise_head


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def batch():
    ids = torch.randint(4, 16000, (1, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.roll(ids, -1, 1)
    targets[0, [6, 11]] = -100
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    return MicroBatch(ids, positions, targets, torch.tensor([0, 7, 12], dtype=torch.int32), 7)


def test_a_plain_head_is_chunked(model, batch):
    loss, why = recognise_head(model, batch)
    assert why == "chunked"
    expected = nn.functional.cross_entropy(
        model(**forward_arguments(batch)).logits[0],
        batch.targets[0],
        reduction="sum",
    )
    assert float(loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_head_with_a_bias_is_not(model, batch):
    model.lm_head.bias = nn.Parameter(torch.zeros(16384))
    assert recognise_head(model, batch)[1] == "unknown head"


def test_logits_that_are_changed_afterwards_are_found_out(model, batch):
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01  # hardly moves a fresh model's loss
        return output

    model.forward = scaled
    loss, why = recognise_head(model, batch)
    assert why == "the model changes its logits"
    expected = nn.functional.cross_entropy(
        scaled(**forward_arguments(batch)).logits[0],
        batch.targets[0],
        reduction="sum",
    )
    assert float(loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_rounding_to_16_bits_is_no_change(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        assert recognise_head(model, batch)[1] == "chunked"
    assert recognise_head(model.bfloat16(), batch)[1] == "chunked"


def test_logits_that_are_no_numbers_are_left_to_the_model(model, batch):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert recognise_head(model, batch)[1] == "the model changes its logits"


def test_distance_is_a_share():
    one = torch.tensor([3.0, 4.0])
    assert distance(one, one) == 0
    assert distance(one + torch.tensor([0.0, 0.5]), one) == pytest.approx(0.1)
    assert distance(one * float("nan"), one) != distance(one, one)
