"""Packed attention against its definition, and the one thing it must never do: let examples see each other."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from kitaeru.kernels import flex
from kitaeru.kernels import packed_attention as packed
from kitaeru.kernels.packed_attention import Sight, packed_attention, packed_attention_reference

SIGHTS = [Sight(), Sight(window=1), Sight(window=4), Sight(softcap=0.7), Sight(window=4, softcap=0.7)]


def case(lengths, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    q = torch.randn(1, heads, total, dim, generator=generator, requires_grad=True)
    k = torch.randn(1, kv_heads, total, dim, generator=generator, requires_grad=True)
    v = torch.randn(1, kv_heads, total, dim, generator=generator, requires_grad=True)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, bounds


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (7, 3, 12), (2, 30)])
@pytest.mark.parametrize(("scale", "sight"), [(None, Sight()), *((0.31, sight) for sight in SIGHTS)])
def test_values_and_gradients_are_those_of_the_definition(lengths, heads, scale, sight):
    q, k, v, bounds = case(lengths, *heads)
    ours = packed_attention(q, k, v, bounds, max(lengths), scale, sight)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    got = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    theirs = packed_attention_reference(q, k, v, bounds, scale, sight)
    (theirs * weight).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, tensor in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=1e-4, atol=1e-5)


def test_an_example_does_not_see_its_neighbours():
    q, k, v, bounds = case((6, 9, 4))
    before = packed_attention(q, k, v, bounds, 9)
    with torch.no_grad():
        k[:, :, :6] += 100
        v[:, :, 15:] -= 100
    after = packed_attention(q, k, v, bounds, 9)
    torch.testing.assert_close(before[:, :, 6:15], after[:, :, 6:15], rtol=0, atol=0)
    assert not torch.equal(before[:, :, :6], after[:, :, :6])


def test_capped_scores_of_a_long_example_are_computed_in_pieces(monkeypatch):
    monkeypatch.setattr(packed, "QUERIES", 7)
    test_values_and_gradients_are_those_of_the_definition((7, 30), (4, 2), 0.31, SIGHTS[-1])


@pytest.mark.parametrize("sight", SIGHTS[2:])
def test_the_definition_by_hand(sight):
    """Each query by a loop of its own: the last tokens of its example, itself among them, scores capped by tanh."""
    q, k, v, bounds = (t.detach() for t in case((6, 9), 2, 1))
    ours = packed_attention_reference(q, k, v, bounds, 0.5, sight)
    for place in range(15):
        begin = max(0 if place < 6 else 6, place - sight.window + 1 if sight.window else 0)
        for head in range(2):
            scores = 0.5 * k[0, 0, begin : place + 1] @ q[0, head, place]
            scores = sight.softcap * (scores / sight.softcap).tanh() if sight.softcap else scores
            torch.testing.assert_close(ours[0, head, place], scores.softmax(0) @ v[0, 0, begin : place + 1])


@pytest.mark.parametrize("lengths", [(7, 3, 12), (130, 126, 5, 251), (1, 1, 128, 126)])
@pytest.mark.parametrize("window", [0, 4, 129])
def test_the_blocks_are_those_that_torch_finds_in_the_whole_mask(lengths, window):
    bounds, tokens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), sum(lengths)
    ours = flex.block_mask(flex.first_seen(bounds, tokens, window))
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def sees(_, __, q, k):
        return (example[q] == example[k]) & (k <= q) & (q - k < (window or tokens))

    theirs = flex_attention.create_block_mask(sees, 1, 1, tokens, tokens, device="cpu")
    assert ours.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(mask, f"{kind}_num_blocks")[0, 0] for mask in (ours, theirs)]
        assert torch.equal(*counts)
        rows = [getattr(mask, f"{kind}_indices")[0, 0] for mask in (ours, theirs)]
        for count, mine, his in zip(counts[0].tolist(), *rows, strict=True):
            assert set(mine[:count].tolist()) == set(his[:count].tolist())


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("sight", SIGHTS[2:])
def test_flex_attention_is_the_definition_both_ways(sight, monkeypatch):
    """As torch computes it without compiling; on a CPU it refuses gradients, which it can very well do."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    lengths = (70, 3, 100)
    q, k, v, bounds = case(lengths)
    ours = flex.attend(q, k, v, bounds, 0.31, sight.window, sight.softcap)
    theirs = packed_attention_reference(q, k, v, bounds, 0.31, sight)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, expected = (torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (ours, theirs))
    for mine, his in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_the_definition_for_rows_of_any_size_and_windows_without_compiling_anew(monkeypatch):
    """By torch's own interpreter in place of its compiler: what is traced, guarded and differentiated is the same."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention.flex_attention, backend=backend, fullgraph=True)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    counts = []
    for lengths in ((65, 3, 80), (150, 37, 70), (20, 30), (130, 126), (5,), (77, 99)):
        for sight in (Sight(64, 5.0), Sight(0, 5.0)):
            packed_row = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in case(lengths)[:3]]
            q, k, v = (t.transpose(1, 2) for t in packed_row)  # [T, heads, D] in memory, as fused layers have it
            ours = flex.attend(q, k, v, case(lengths)[3], 0.31, sight.window, sight.softcap)
            assert ours.transpose(1, 2).is_contiguous()
            theirs = packed_attention_reference(q, k, v, case(lengths)[3], 0.31, sight)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            weight = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
            got, expected = (torch.autograd.grad((t * weight).sum(), packed_row) for t in (ours, theirs))
            for mine, his in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)
        counts.append(backend.frame_count)
    assert counts == [1, 2, 3, 3, 3, 3]  # one number of tokens, any, a single block


def test_a_capped_score_of_any_size_has_a_finite_gradient():
    score = torch.tensor([0.0, 1e-6, 3.0, -40.0, 1e5, -1e5], requires_grad=True)
    capped = flex._capping(30.0)(score)
    torch.testing.assert_close(capped, 30 * (score / 30).tanh(), rtol=1e-6, atol=4e-6)
    (slope,) = torch.autograd.grad(capped.sum(), score)
    torch.testing.assert_close(slope, 1 - (score.detach() / 30).tanh() ** 2, rtol=1e-5, atol=1e-6)


def test_layers_of_a_micro_batch_share_a_mask_and_the_next_one_does_not():
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    first = flex._mask(bounds, 12, 4)
    assert flex._mask(bounds, 12, 4) is first
    assert flex._mask(bounds, 12, 0) is not first
    bounds.copy_(torch.tensor([0, 7, 12]))
    q, k = torch.tensor([6, 7]), torch.tensor([4, 6])
    assert first.mask_mod(None, None, q, k).tolist() == [False, True]
    assert flex._mask(bounds, 12, 4).mask_mod(None, None, q, k).tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("sight", [Sight(), Sight(window=50), Sight(softcap=2.0), Sight(window=50, softcap=2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_on_a_gpu_it_is_the_definition_too(dtype, heads, sight, monkeypatch):
    monkeypatch.setattr(flex, "tiles", "flex")
    q, k, v, bounds = case((65, 3, 200), *heads, dim=64)
    q, k, v = (t.detach().cuda().to(dtype).requires_grad_() for t in (q, k, v))
    bounds = bounds.cuda()
    ours = packed_attention(q, k, v, bounds, 200, 0.2, sight)
    ours.float().sum().backward()
    got = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    theirs = packed_attention_reference(q, k, v, bounds, 0.2, sight)
    theirs.float().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, tensor in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=tolerance * 3, atol=tolerance * 3)
