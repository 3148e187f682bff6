"""The output head and the loss as one operation that never holds all logits.

hidden [T, h], weight [V, h], targets int64 [T] with -100 for positions that do not count. The loss is a SUM over the
positions that count, in fp32 nats: the caller divides by the trained tokens of the whole global batch, so that any
split into micro-batches gives the same training. With `z_loss` z, each position adds z (log Z)^2, Z being what softmax
divides by (PaLM, arXiv 2204.02311, section 5); where no gradient is wanted it does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitaeru.kernels.triton_or_none import tl, triton, use_triton
from kitaeru.plan.memory import HEAD_CHUNK_ROWS

IGNORED = -100


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, *, z_loss: float = 0.0
) -> Tensor:
    """The definition, with all logits at once: a scalar, fp32."""
    return cross_entropy(logits_of(hidden, weight, softcap), targets, z_loss)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """The same from logits [T, V] in fp32."""
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    if z_loss and torch.is_grad_enabled():
        loss = loss + z_loss * logits[targets != IGNORED].logsumexp(-1).square().sum()
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    counted: Tensor | None = None,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """The same scalar by chunks of rows, with the gradient formed in the forward pass.

    Only the rows `counted` meet the head (int64 [R], in which are all that count; without it these are looked for,
    which waits for the device): prompt tokens cost nothing here. In chunks of C = HEAD_CHUNK_ROWS rows,
    peak memory is one chunk of fp32 logits and one copy of it, 2 C V 4 bytes, and the gradient of `hidden` (and of
    `weight`, in fp32, when it is trained). On a GPU in 16 bits it is 2 C V bytes: the gradient takes the logits' place.
    """
    learns = torch.is_grad_enabled()  # which within an autograd function it never is
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, softcap, counted, z_loss if learns else 0.0, learns
    )
    return loss


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """fp32 [..., V] from hidden [..., h]; with `softcap` c, c tanh(logits / c)."""
    logits = (hidden @ weight.T).float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        counted: Tensor | None,
        z_loss: float,
        learns: bool,
    ) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            hidden_compute = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        else:
            hidden_compute = hidden
        weight_compute = weight.to(hidden_compute.dtype)
        rows = (targets != IGNORED).nonzero().squeeze(1) if counted is None else counted
        needs_hidden, needs_weight = (learns and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in rows.split(HEAD_CHUNK_ROWS):
            x, wanted = hidden_compute[chunk], targets[chunk]
            if use_triton(x) and x.dtype != torch.float32 and not softcap:
                grad = x @ weight_compute.T
                loss += _softmax_in_place(grad, wanted, z_loss).sum()
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad @ weight_compute).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ x
                del grad
                continue
            logits = logits_of(x, weight_compute, softcap)
            log_total = torch.logsumexp(logits, dim=-1)
            counts = wanted != IGNORED
            wanted = wanted.clamp_min(0)[:, None]
            loss += ((log_total - logits.gather(1, wanted).squeeze(1) + z_loss * log_total.square()) * counts).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope = 1 - (logits / softcap) ** 2 if softcap else None
            drift = 1 + 2 * z_loss * log_total
            log_total.masked_fill_(~counts, float("inf"))
            grad = logits.sub_(log_total[:, None]).exp_()  # softmax, in place of the logits; 0 where nothing counts
            if z_loss:
                grad *= drift[:, None]
            grad.scatter_add_(1, wanted, -counts[:, None].to(grad.dtype))
            if slope is not None:
                grad *= slope
            grad = grad.to(x.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad @ weight_compute).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.over = weight.dtype, False
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        if ctx.over:
            raise RuntimeError("the backward pass of this head has run already, and used its gradients up")
        ctx.over = True
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(upstream.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(upstream).to(ctx.weight_dtype),
            *(None,) * 5,
        )


def _softmax_in_place(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """The loss of each row, fp32 [rows]; logits [rows, V] become their gradient, softmax less one at the target. Both
    are 0 where no target counts.
    """
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _row_loss[(rows,)](logits, targets, losses, logits.stride(0), vocab, float(z_loss), BLOCK=8192, num_warps=16)
    return losses


if triton is not None:

    @triton.jit
    def _row_loss(logits, targets, losses, stride, vocab, z_loss, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        columns = tl.arange(0, BLOCK)
        target = tl.load(targets + row)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + columns
            values = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            new = tl.maximum(highest, values)
            # A lane that has seen nothing yet has nothing to scale.
            total = total * tl.where(highest == float("-inf"), 0.0, tl.exp(highest - new))
            total += tl.where(new == float("-inf"), 0.0, tl.exp(values - new))
            highest = new
        top = tl.max(highest, 0)
        log_total = top + tl.log(tl.sum(total * tl.where(highest == float("-inf"), 0.0, tl.exp(highest - top)), 0))
        counts = target >= 0
        own = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
        tl.store(losses + row, tl.where(counts, log_total - own + z_loss * log_total * log_total, 0.0))
        drift = 1.0 + 2.0 * z_loss * log_total
        log_total = tl.where(counts, log_total, float("inf"))
        tl.debug_barrier()  # the target's logit has been read before it is overwritten
        for start in range(0, vocab, BLOCK):
            at = start + columns
            values = tl.load(logits + at, mask=at < vocab, other=0.0).to(tl.float32)
            gradient = tl.exp(values - log_total) * drift - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < vocab)
