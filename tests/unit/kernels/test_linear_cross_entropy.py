"""The chunked head against its definition: value, gradients, splits, soft-capping, 16 bits."""

import pytest
import torch

from kitaeru.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kitaeru.plan.memory import HEAD_CHUNK_ROWS as CHUNK_ROWS


def case(rows, hidden=24, vocabulary=57, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.4] = -100
    return x, w, targets


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [1, 7, CHUNK_ROWS, CHUNK_ROWS * 2 + 3])
def test_value_and_gradients_are_those_of_the_definition(rows, softcap):
    x, w, targets = case(rows)
    targets[0] = 3
    ours = linear_cross_entropy(x, w, targets, softcap)
    (ours * 0.37).backward()
    got_x, got_w = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    theirs = linear_cross_entropy_reference(x, w, targets, softcap)
    (theirs * 0.37).backward()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(got_x, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_w, w.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_softmax_divides_by_may_cost_too(softcap):
    x, w, targets = case(CHUNK_ROWS + 3)
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        x.grad = w.grad = None
        loss = function(x, w, targets, softcap, z_loss=0.02)
        loss.backward()
        found.append((loss.detach(), x.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = linear_cross_entropy(x, w, targets, softcap)
    assert found[0][0] > 1.05 * plain.detach()
    with torch.no_grad():  # a validation is of the text alone
        assert linear_cross_entropy(x, w, targets, softcap, z_loss=0.02) == plain
        torch.testing.assert_close(linear_cross_entropy_reference(x, w, targets, softcap, z_loss=0.02), plain)


def test_where_nothing_is_learned_no_gradient_is_formed(monkeypatch):
    x, w, targets = case(8)
    formed = []
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: formed.append(a) or torch.empty_like(*a, **k))
    with torch.no_grad():
        linear_cross_entropy(x, w, targets)
    assert not formed
    linear_cross_entropy(x, w, targets)
    assert len(formed) == 2


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_may_be_named_and_some_of_them_may_not_count(softcap):
    x, w, targets = case(CHUNK_ROWS + 40)
    counts = targets != -100
    theirs = linear_cross_entropy(x, w, targets, softcap)
    theirs.backward()
    want_x, want_w = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    named = torch.cat([counts.nonzero().squeeze(1), (~counts).nonzero().squeeze(1)[:30]])
    ours = linear_cross_entropy(x, w, targets, softcap, named)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, want_x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(w.grad, want_w, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_numerical_one():
    x, w, targets = case(5, hidden=4, vocabulary=9)
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    loss = linear_cross_entropy(x, w, targets)
    (3 * loss).backward()
    for tensor in (x, w):
        place, step = int(tensor.grad.abs().argmax()), 1e-3
        shifted = []
        for sign in (1, -1):
            moved = tensor.detach().clone()
            moved.view(-1)[place] += sign * step
            shifted.append(linear_cross_entropy(*((moved, w) if tensor is x else (x, moved)), targets).item())
        # The loss itself is fp32, so only a coarse numerical derivative can be compared.
        assert 3 * (shifted[0] - shifted[1]) / (2 * step) == pytest.approx(tensor.grad.view(-1)[place].item(), rel=2e-2)


def test_a_second_backward_pass_is_refused():
    x, w, targets = case(5)
    loss = linear_cross_entropy(x, w, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run already"):
        loss.backward()


def test_nothing_counts_gives_zero_and_no_gradient():
    x, w, targets = case(6)
    targets[:] = -100
    loss = linear_cross_entropy(x, w, targets)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not w.grad.any()


def test_frozen_weight_gets_no_gradient_buffer():
    x, w, targets = case(6)
    w = w.detach()
    linear_cross_entropy(x, w, targets).backward()
    assert w.grad is None
    assert x.grad.any()


@pytest.mark.parametrize("cut", [1, 100, 700])
def test_any_split_sums_to_the_whole(cut):
    x, w, targets = case(1000)
    whole = linear_cross_entropy(x, w, targets)
    parts = linear_cross_entropy(x[:cut], w, targets[:cut]) + linear_cross_entropy(x[cut:], w, targets[cut:])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


def test_under_autocast_the_loss_stays_fp32_and_close():
    x, w, targets = case(64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, w, targets)
    ours.backward()
    assert ours.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(ours, linear_cross_entropy_reference(x, w, targets), rtol=2e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 32000, 50001])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_on_a_gpu_the_gradient_takes_the_logits_place_and_is_right(vocab, z_loss):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 256, generator=generator).cuda().bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(vocab, 256, generator=generator)).cuda().bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (700,), generator=generator).cuda()
    targets[::7] = -100
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden.grad = weight.grad = None
        loss = function(hidden, weight, targets, z_loss=z_loss)
        loss.backward()
        found.append((loss.detach(), hidden.grad.clone(), weight.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < 0.01
