"""Which kernels compute attention: of flash attention torch's own (FlashAttention 2), or 3 or 4 where one is installed;
of FlexAttention, for soft-capped scores, the largest tiles that a GPU has room for, or none.

`torch.nn.attention` puts flash attention under torch's operations, so whoever calls these gets it
(kernels/packed_attention.py). None is taken unasked: each that is there is held against the definition, both passes,
and timed on packed examples; the fastest that is right stays.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import attention as implementations

from kitaeru.kernels import flex
from kitaeru.kernels.packed_attention import PLAIN, Sight, attend, attend_backward, packed_attention_reference

# By torch's name for each: the module that it comes in, and what people call it.
MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
TITLES = {
    None: "FlashAttention 2", "FA3": "FlashAttention 3", "FA4": "FlashAttention 4",
    "flex": "FlexAttention", "flex-small": "FlexAttention (small tiles)",
    "flex-smallest": "FlexAttention (smallest tiles)",
}  # fmt: skip
# What torch must have; not all versions do.
REGISTRY = ("activate_flash_attention_impl", "current_flash_attention_impl", "restore_flash_attention_impl")
# How far 16-bit results may be from the definition's, as a share of their size.
CLOSE = 0.02
# Examples that are compared, with windows no longer than this, and such that are timed.
FEW_WINDOW = 70
FEW, MANY = (65, 3, 200), (1500, 37, 700, 1859, 4096)
# A faster one must be so by this share: otherwise chance decides.
GAIN = 1.03
# Seconds of a call, however they are measured.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Shape:
    """Attention of a model's layers: query heads, key heads, their width, the factor of scores, and what queries see in
    the kinds of layers that there are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    sights: tuple[Sight, ...] = (PLAIN,)

    @property
    def capped(self) -> bool:
        """Whether some layer's scores are."""
        return any(sight.softcap for sight in self.sights)


@dataclass(frozen=True)
class Tried:
    """An implementation, by torch's name (None: its own), and what it took in seconds for both passes; infinite where
    it fails or is wrong, `why` in words.
    """

    name: str | None
    seconds: float
    why: str = ""

    @property
    def title(self) -> str:
        """What people call it."""
        return TITLES[self.name]


def installed(device: torch.device) -> list[str]:
    """Those that are there and that this device has kernels for."""
    if device.type != "cuda" or not all(hasattr(implementations, name) for name in REGISTRY):
        return []
    major = torch.cuda.get_device_capability(device)[0]
    fit = {"FA3": major == 9, "FA4": major in (9, 10)}
    return [name for name, module in MODULES.items() if fit[name] and _is_there(module)]


def settle(shape: Shape, device: torch.device, time: Timer, dtype: torch.dtype = torch.bfloat16) -> list[Tried]:
    """Try what is installed beside torch's own, and leave the fastest that is right in place: the first of the list,
    the fastest by `time` first. Empty, and nothing is changed, if nothing is installed.

    For capped scores FlexAttention's tiles are tried, which are compiled first, until some are right: torch's own suit
    most GPUs. If none are, the first one has no finite time, and attention is computed an example at a time.
    """
    if shape.capped:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            return []
        tried: list[Tried] = []
        for name in flex.TILES:
            tried.insert(0, _tried(name, shape, device, time, dtype))
            if math.isfinite(tried[0].seconds):
                return tried
        use(None)
        return tried
    names = installed(device)
    if not names:
        return []
    own = _tried(None, shape, device, time, dtype)
    others = [_tried(name, shape, device, time, dtype) for name in names]
    best = min(others, key=lambda tried: tried.seconds)
    if best.seconds * GAIN > own.seconds:
        best = own
    use(best.name)
    return [best, *sorted((t for t in (own, *others) if t is not best), key=lambda tried: tried.seconds)]


def use(name: str | None) -> None:
    """Let torch's operations run this one from now on; None: torch's own, and no kernel for capped scores."""
    flex.tiles = name if name in flex.TILES else None
    if name is not None and flex.tiles is None:
        implementations.activate_flash_attention_impl(name)
    elif implementations.current_flash_attention_impl() is not None:
        implementations.restore_flash_attention_impl()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package around it
        return False


def _tried(name: str | None, shape: Shape, device: torch.device, time: Timer, dtype: torch.dtype) -> Tried:
    try:
        use(name)
        off = _off(shape, device, dtype)
        if not off <= CLOSE:  # which nan is not
            return Tried(name, float("inf"), f"{off:.3f}")
        inputs, starts, up = _packed(MANY, shape, device, dtype)

        def layers() -> list[tuple[Tensor, ...]]:  # one of each kind
            return [attend_backward(up, attend(*inputs, starts, max(MANY), shape.scale, s)) for s in shape.sights]

        return Tried(name, time(layers))
    except Exception as error:  # somebody else's package, compiled for who knows what
        return Tried(name, float("inf"), f"{type(error).__name__}: {error}".partition("\n")[0])


def _packed(
    lengths: tuple[int, ...], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """q, k and v [T, heads, D], where examples start, and a gradient of the result."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, up = (
        torch.randn((sum(lengths), count, shape.head_dim), generator=generator, device=device, dtype=dtype)
        for count in heads
    )
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return (q, k, v), starts, up


def _off(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """The largest distance of the result and the three gradients from the definition's, as a share of their size. A
    distance that is no number stays.
    """
    inputs, starts, up = _packed(FEW, shape, device, dtype)
    offs = []
    for sight in shape.sights:
        seen = replace(sight, window=min(sight.window, FEW_WINDOW))
        done = attend(*inputs, starts, max(FEW), shape.scale, seen)
        ours = (done.output, *attend_backward(up, done))
        leaves = [t.float().requires_grad_() for t in inputs]
        q, k, v = (t.transpose(0, 1)[None] for t in leaves)
        exact = packed_attention_reference(q, k, v, starts, shape.scale, seen)[0].transpose(0, 1)
        theirs = (exact, *torch.autograd.grad(exact, leaves, up.float()))
        offs += [
            (a.detach().float() - b).norm() / b.norm() for a, b in zip(ours, (t.detach() for t in theirs), strict=True)
        ]
    return float(torch.stack(offs).max())  # which passes nan on
