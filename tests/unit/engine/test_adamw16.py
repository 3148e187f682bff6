"""AdamW with moments in 16 bits: small updates are not lost, and it rounds alike however it is cut and resumed."""

from __future__ import annotations

import torch
from torch import nn

from kitaeru.engine import adamw16
from kitaeru.engine.adamw16 import AdamW16
from kitaeru.engine.optim import build_optimizer, load_optimizer_state, optimizer_state
from kitaeru.recipe.types import TrainSection

SIZE = 4096


def made(weights: torch.Tensor, first: int = 0) -> tuple[nn.Parameter, AdamW16]:
    parameter = nn.Parameter(weights.clone())
    optimizer = AdamW16(
        [{"params": [parameter], "weight_decay": 0.1}],
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        places={parameter: ("layer.weight", first)},
    )
    return parameter, optimizer


def gradient(step: int) -> torch.Tensor:
    return 0.01 * torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(step))


def run(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        parameter.grad = gradient(step)[rows]
        optimizer.step()


def test_it_is_torch_s_adamw_but_for_the_rounding_of_moments() -> None:
    start = torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(9))
    ours, optimizer = made(start)
    theirs = nn.Parameter(start.clone())
    exact = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    run(ours, optimizer, range(1))
    run(theirs, exact, range(1))
    assert torch.equal(ours, theirs)  # moments are rounded after they were used
    run(ours, optimizer, range(1, 150))
    run(theirs, exact, range(1, 150))
    moved = (theirs - start).detach().norm()
    assert 0 < float((ours - theirs).detach().norm() / moved) < 0.01
    assert optimizer.state[ours]["step"] == exact.state[theirs]["step"] == 150


def test_updates_of_a_thousandth_are_not_lost() -> None:
    """From one second moment to a hundredth of it, by a thousandth a step: to the nearest it would not move at all."""
    parameter, optimizer = made(torch.zeros(SIZE, 8))
    parameter.grad = torch.ones(SIZE, 8)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.full((SIZE, 8), 0.1)
    for _ in range(700):
        optimizer.step()
    wanted = 0.01 + 0.99 * 0.999**700
    found = state["exp_avg_sq"].float()
    assert abs(float(found.mean()) / wanted - 1) < 2e-3
    assert float(found.std()) / wanted < 0.07
    lost = torch.ones((), dtype=torch.bfloat16)
    assert (lost.float() * 0.999 + 0.001 * 0.01).to(torch.bfloat16) == 1.0


def test_rounding_does_not_depend_on_how_a_weight_is_cut(monkeypatch) -> None:
    start = torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(9))
    whole, optimizer = made(start)
    run(whole, optimizer, range(5))
    cut = SIZE // 3
    monkeypatch.setattr(adamw16, "CHUNK", 1000)
    for rows in (slice(0, cut), slice(cut, SIZE)):
        piece, own = made(start[rows], rows.start * 8)
        run(piece, own, range(5), rows)
        assert torch.equal(piece, whole[rows])
        for kind in AdamW16.MOMENTS:
            assert torch.equal(own.state[piece][kind], optimizer.state[whole][kind][rows])


def test_moments_are_saved_in_16_bits_and_go_on_in_32_and_back() -> None:
    start = torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(9))
    parameter, optimizer = made(start)
    run(parameter, optimizer, range(3))
    named = [("layer.weight", parameter)]
    saved, scalars = optimizer_state(optimizer, named)
    assert {saved[f"layer.weight/{kind}"].dtype for kind in AdamW16.MOMENTS} == {torch.bfloat16}

    again, fresh = made(parameter.detach())
    load_optimizer_state(fresh, [("layer.weight", again)], dict(saved), scalars)
    run(parameter, optimizer, range(3, 6))
    run(again, fresh, range(3, 6))
    assert torch.equal(again, parameter)

    section = TrainSection(weight_decay=0.1, learning_rate=1e-3)
    options = {"learning_rate": 1e-3, "lora_plus_ratio": None, "device_type": "cpu"}
    wide = build_optimizer([("layer.weight", again)], section, **options)
    load_optimizer_state(wide, [("layer.weight", again)], dict(saved), scalars)
    moment = wide.state[again]["exp_avg_sq"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, saved["layer.weight/exp_avg_sq"].float())
    run(again, wide, range(3, 6))  # and it steps
    tensors, scalars = optimizer_state(wide, [("layer.weight", again)])
    load_optimizer_state(fresh, [("layer.weight", again)], tensors, scalars)
    assert fresh.state[again]["exp_avg"].dtype == torch.bfloat16
