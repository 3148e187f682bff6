"""Packed attention against its definition, and the one thing it must never do: let examples see each other."""

import pytest
import torch

from kitaeru.kernels.packed_attention import packed_attention, packed_attention_reference


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
@pytest.mark.parametrize("scale", [None, 0.31])
def test_values_and_gradients_are_those_of_the_definition(lengths, heads, scale):
    q, k, v, bounds = case(lengths, *heads)
    ours = packed_attention(q, k, v, bounds, max(lengths), scale)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    got = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    theirs = packed_attention_reference(q, k, v, bounds, scale)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_on_a_gpu_it_is_the_definition_too(dtype, heads):
    q, k, v, bounds = case((65, 3, 200), *heads, dim=64)
    q, k, v = (t.detach().cuda().to(dtype).requires_grad_() for t in (q, k, v))
    bounds = bounds.cuda()
    ours = packed_attention(q, k, v, bounds, 200, 0.2)
    ours.float().sum().backward()
    got = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    theirs = packed_attention_reference(q, k, v, bounds, 0.2)
    theirs.float().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, tensor in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=tolerance * 3, atol=tolerance * 3)
