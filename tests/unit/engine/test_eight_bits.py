"""What products in 8 bits cost in loss and gradient is seen before training; what costs too much is done in 16."""

import dataclasses

import pytest
import torch

from kitaeru.engine import eight_bits
from kitaeru.engine.eight_bits import LEAST, MOST, Compared, settle_eight_bits
from kitaeru.plan.types import Decision

SITES = ("qkv", "out", "both", "down")


@pytest.fixture
def made(training, bundled, chat_data, tmp_path):
    """A run of the bundled model in INT8, and a way to say whose choice that was."""

    def make(*, decided):
        run = training.Training(tmp_path, bundled, chat_data, arithmetic="int8", micro_batch_tokens=512)
        decisions = (Decision("train.arithmetic", "int8", ""),) if decided else ()
        run.trainee.plan = dataclasses.replace(run.plan, decisions=decisions)
        run.trainee.model.eval()
        return run

    return make


def spoil(trainee, module, by):
    """Make one channel of what `module` reads larger, and its weights for it smaller: the same function, exactly. Of
    "k_proj" make a pair of its results larger, and smaller those of the queries that meet them.
    """
    for layer in trainee.causal_lm.model.layers:
        with torch.no_grad():
            if module == "k_proj":
                q, k = (
                    getattr(layer.self_attn, name).base_layer.weight.view(-1, 64, 256) for name in ("q_proj", module)
                )
                k[0, [5, 37]] *= by
                q[:2, [5, 37]] /= by
            elif module == "down_proj":
                layer.mlp.up_proj.base_layer.weight[5] *= by
                layer.mlp.down_proj.base_layer.weight[:, 5] /= by
            else:
                layer.input_layernorm.weight[5] *= by
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(layer.self_attn, name).base_layer.weight[:, 5] /= by
    for fused in trainee.fused:  # scales and expanded weights are made once
        for site in SITES:
            now = getattr(fused, site)
            setattr(fused, site, type(now)(now.members, now.arithmetic, now.compute))


def kinds(trainee):
    return {site: {getattr(layer, site).arithmetic for layer in trainee.fused} for site in SITES}


def test_what_is_near_enough():
    nan = float("nan")
    assert Compared(-MOST).near
    assert Compared(0.0, LEAST, 1.1).near
    assert not any(
        far.near
        for far in (
            Compared(2 * MOST, 1.0, 1.0), Compared(0.0, LEAST - 0.01, 1.0), Compared(0.0, 1.0, 1.3),
            Compared(0.0, 1.0, 0.8), Compared(nan, 1.0, 1.0), Compared(0.0, nan, 1.0), Compared(0.0, 1.0, nan),
        )
    )  # fmt: skip


def test_what_costs_nothing_stays(made):
    run = made(decided=True)
    settle_eight_bits(run.loop)
    assert kinds(run.trainee) == {site: {"int8"} for site in SITES}
    said = run.notices[-1]
    assert said.level == "info"
    assert "Products in 8 bits change the loss by" in said.text
    assert "cosine of the gradients 1.000, size 1.00" in said.text


@pytest.mark.parametrize(("module", "wide"), [("down_proj", ("down",)), ("q_proj", ("down", "qkv"))])
def test_what_costs_too_much_is_computed_in_16_bits(made, module, wide):
    run = made(decided=True)
    spoil(run.trainee, module, 1e5 if module == "q_proj" else 1000.0)
    weights = {name: value.clone() for name, value in run.trainee.model.state_dict().items()}
    settle_eight_bits(run.loop)
    assert kinds(run.trainee) == {site: {"16bit" if site in wide else "int8"} for site in SITES}
    assert run.notices[-1].level == "warning"
    assert "so they are computed" in run.notices[-1].text
    assert all(torch.equal(value, weights[name]) for name, value in run.trainee.model.state_dict().items())
    batches = run.loop._split(list(range(12)))
    eight = run.loop.mean_loss(batches)
    for layer in run.trainee.fused:
        layer.on = False
    assert eight == pytest.approx(run.loop.mean_loss(batches), rel=MOST)
    for layer in run.trainee.fused:
        layer.on = True
    assert run.run() == "finished"


def test_what_costs_too_much_in_the_gradient_alone_is_found(made, monkeypatch):
    """Keys that are large where queries are small: forward nothing is lost, and on the way back a row of the incoming
    gradient has one number that leaves the others no bits.
    """
    run = made(decided=True)
    spoil(run.trainee, "k_proj", 1e4)
    seen = []
    near = Compared.near.fget
    monkeypatch.setattr(Compared, "near", property(lambda self: (seen.append(self), near(self))[1]))
    weights = {name: value.clone() for name, value in run.trainee.model.state_dict().items()}
    torch.manual_seed(7)
    settle_eight_bits(run.loop)
    drawn = torch.rand(3)
    assert kinds(run.trainee) == {site: {"16bit" if site in ("down", "qkv") else "int8"} for site in SITES}
    nothing, down, qkv = seen[:3]
    assert all(abs(found.shift) <= MOST for found in seen)
    assert max(nothing.cosine, down.cosine) < LEAST < qkv.cosine
    assert "so they are computed" in run.notices[-1].text
    # Nothing else is left of it.
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert all(torch.equal(value, weights[name]) for name, value in run.trainee.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.trainee.model.parameters())
    assert not run.trainee.optimizer.state
    assert not run.trainee.causal_lm.is_gradient_checkpointing


def test_the_angle_is_that_of_the_gradients(made):
    """Against both gradients taken by hand, with an adapter that has begun to learn."""
    run = made(decided=True)
    trainee, loop = run.trainee, run.loop
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainee.named:
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    spoil(trainee, "k_proj", 300.0)
    batches = loop._split(list(range(6)))
    compared = eight_bits._Gradients(loop, batches)

    def by_hand(on):
        for layer in trainee.fused:
            layer.on = on
        loop._gradients(batches, batches.trained_tokens, 0)
        found = torch.cat([p.grad.flatten().double() for _, p in trainee.named])
        trainee.optimizer.zero_grad()
        return found

    own, eight = by_hand(False), by_hand(True)
    for layer in trainee.fused:
        layer.on = False
    compared.keep_own()
    for layer in trainee.fused:
        layer.on = True
    cosine, length = compared.compare()
    assert cosine == pytest.approx(float(torch.cosine_similarity(own, eight, 0)), abs=1e-5)
    assert length == pytest.approx(float(eight.norm() / own.norm()), rel=1e-5)
    assert cosine < 0.999


def test_of_examples_longer_than_what_is_looked_at_only_the_end_is(made, monkeypatch):
    run = made(decided=True)
    longest = int(run.loop.train.lengths.max())
    for name in ("TOKENS", "AT_ONCE"):
        monkeypatch.setattr(eight_bits, name, longest // 2)
    seen = []
    run.trainee.causal_lm.model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    settle_eight_bits(run.loop)
    assert seen
    assert max(seen) <= longest // 2
    assert "Products in 8 bits change the loss by" in run.notices[-1].text


def test_a_recipe_that_asks_for_8_bits_gets_them_and_is_told(made):
    run = made(decided=False)
    spoil(run.trainee, "down_proj", 1000.0)
    settle_eight_bits(run.loop)
    assert kinds(run.trainee) == {site: {"int8"} for site in SITES}
    assert run.notices[-1].level == "warning"
    assert "The recipe asks for them" in run.notices[-1].text


def test_nothing_is_said_where_there_are_none(training, tiny_model, chat_data, tmp_path):
    run = training.Training(tmp_path, tiny_model, chat_data, arithmetic="16bit")
    heard = len(run.notices)
    settle_eight_bits(run.loop)
    assert len(run.notices) == heard


@pytest.fixture
def full(training, bundled, chat_data, tmp_path):
    """A run of the bundled model in which every weight is trained."""

    def make(arithmetic, **options):
        options = {"micro_batch_tokens": 512, "train__learning_rate": 3e-4, "train__max_steps": 5} | options
        return training.Training(tmp_path / arithmetic, bundled, chat_data, "full", arithmetic=arithmetic, **options)

    return make


def test_full_training_in_8_bits_learns_as_in_16(full):
    losses = {}
    for arithmetic in ("plain", "fp8", "int8"):
        run = full(arithmetic)
        assert bool(run.trainee.rounded) == (arithmetic != "plain")
        assert run.run() == "finished"
        losses[arithmetic] = run.losses
    assert losses["plain"][-1] < 0.7 * losses["plain"][0]
    for arithmetic, most in (("fp8", 0.02), ("int8", 0.01)):
        assert losses[arithmetic] == pytest.approx(losses["plain"], rel=most)
        assert losses[arithmetic] != losses["plain"]


def test_what_costs_too_much_in_full_training_is_computed_in_16_bits(full, monkeypatch):
    """Though the recipe names the arithmetic: full training has no other way to ask for 8 bits."""
    monkeypatch.setattr(eight_bits, "TOKENS", 1024)
    monkeypatch.setattr(eight_bits, "GRADIENT_TOKENS", 512)
    run = full("int8", activations="recompute", train__max_steps=1)
    trainee = run.trainee
    for layer in trainee.causal_lm.model.layers:
        with torch.no_grad():
            layer.mlp.up_proj.weight[5] *= 1000
            layer.mlp.down_proj.weight[:, 5] /= 1000
    weights = {name: value.clone() for name, value in trainee.model.state_dict().items()}
    settle_eight_bits(run.loop)
    for layer in trainee.rounded:
        kinds = {name: site.arithmetic for name, site in layer.sites.items()}
        assert kinds == {"qkv": "int8", "out": "int8", "both": "int8", "down": "16bit"}
    assert run.notices[-1].level == "warning"
    assert "With the MLP's last product in 16 bits it is" in run.notices[-1].text
    assert "cosine of the gradients" in run.notices[-1].text
    assert all(torch.equal(value, weights[name]) for name, value in trainee.model.state_dict().items())
    assert all(p.grad is None for _, p in trainee.named)
    assert trainee.causal_lm.is_gradient_checkpointing  # as the plan has it
    assert run.run() == "finished"


@pytest.mark.parametrize(
    "how", [{"variant": "offload"}, {"step_in_backward": True, "train__max_grad_norm": 0.0, "micro_batch_tokens": 256}]
)
def test_without_room_for_two_gradients_the_loss_alone_is_looked_at(training, tiny_model, chat_data, tmp_path, how):
    options = {"arithmetic": "fp8", "activations": "recompute", **how}
    run = training.Training(tmp_path, tiny_model, chat_data, "full", **options)
    settle_eight_bits(run.loop)
    assert "Products in 8 bits change the loss by" in run.notices[-1].text
    assert "cosine" not in run.notices[-1].text
    assert run.run() == "finished"
