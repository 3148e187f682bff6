"""Where the gradients of a model in 8 bits go wrong: row by row, and with roundings put in one at a time.

    python benchmarks/eight_bit_gradient.py MODEL_FOLDER --texts ja-text/valid.jsonl --rows 0 8 --out FILE.csv

Cosine and size of all adapter gradients of a row of 512 tokens beside those of fp32, and its loss. "fused" is the
layer as it trains. The others are the model's own code, in which nothing but the frozen products is rounded: what they
read forward, backward (the incoming gradient and the weights turned round) or both, and but for the first two tokens;
"noise" is fp32 whose products are off by 1 % at random. "peak": the size of the second token in the stream after layer
`--layer`, as a multiple of that of fp32. Why: docs/notes/0019.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from eight_bit_error import adapted, losses, prepared, rounded
from table import write
from torch import Tensor

from kitaeru.model.fused import fused_layer, install

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
NOISE = 0.01


@dataclass
class Way:
    """How frozen products are computed: the numbers forward and backward read, and tokens that forward leaves alone."""

    forward: str = ""
    backward: str = ""
    exact: slice = field(default_factory=lambda: slice(0))

    def read(self, values: Tensor, kind: str) -> Tensor:
        """Values [T, K], each row rounded."""
        if kind in ("", "noise"):
            return values
        return values.bfloat16().float() if kind == "bf16" else rounded(values, DTYPES[kind], plain=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, way: Way) -> Tensor:
        ctx.weight, ctx.way = weight, way
        flat = x.flatten(0, -2)
        exact = flat @ weight.T
        y = way.read(flat, way.forward) @ way.read(weight, way.forward).T
        if way.forward == "noise":
            off = torch.randn_like(y)
            y = y + NOISE * off * y.norm(dim=1, keepdim=True) / off.norm(dim=1, keepdim=True)
        y[way.exact] = exact[way.exact]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        way, dy = ctx.way, upstream[0]
        turned_round = way.read(ctx.weight.T.contiguous(), way.backward)
        return (way.read(dy.flatten(0, -2), way.backward) @ turned_round.T).view(*dy.shape[:-1], -1), None, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--ways", nargs="+", help="some of them only")
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, rows, given = prepared(arguments.model, arguments.texts, max(arguments.rows) + 1)
    whole = adapted(model)
    way, peaks = Way(), []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            frozen = module.get_base_layer()
            frozen.forward = lambda x, weight=frozen.weight: _Product.apply(x, weight, way)
    model.model.layers[arguments.layer].register_forward_hook(
        lambda _, __, out: peaks.append(float((out[0] if isinstance(out, tuple) else out)[0, 1].detach().norm()))
    )
    ways = {
        "int8": Way("int8", "int8"), "int8 backward": Way("", "int8"), "int8 forward": Way("int8"),
        "int8 forward, but 2 tokens": Way("int8", "", slice(0, 2)), "fp8": Way("fp8", "fp8"),
        "bf16": Way("bf16", "bf16"),
        **{f"noise {seed}": Way("noise") for seed in range(4)},
    }  # fmt: skip
    names = arguments.ways or ["int8 fused", "fp8 fused", *ways]
    table: list[dict[str, Any]] = []
    sums: dict[str, Tensor] = {}
    for row in arguments.rows:
        for name in ("", *names):
            removers = []
            if name.endswith("fused"):
                kind: Any = name.split()[0]
                layers = model.model.layers
                removers = [install(each, fused_layer(each, model.config, kind, torch.float32)) for each in layers]
            now = ways.get(name, Way())
            way.forward, way.backward, way.exact = now.forward, now.backward, now.exact
            torch.manual_seed(row + 1000 * int(name.split()[1]) if name.startswith("noise") else 0)
            [loss], gradient = losses(model, whole, rows[row : row + 1], given)
            for remove in removers:
                remove()
            sums[name] = sums.get(name, 0) + gradient
            if not name:
                exact, own = gradient, (float(loss), peaks[-1])
                continue
            more = {"loss": f"{float(loss) / own[0] - 1:.5f}", "peak": f"{peaks[-1] / own[1]:.3f}"}
            table.append(_line(arguments.model, str(row), name, gradient, exact) | more)
            print(*table[-1].values(), flush=True)
    table += [_line(arguments.model, "all", name, sums[name], sums[""]) | {"loss": "", "peak": ""} for name in names]
    write(arguments.out, table)


def _line(model: Path, row: str, way: str, gradient: Tensor, exact: Tensor) -> dict[str, str]:
    cosine = float(torch.cosine_similarity(gradient, exact, dim=0))
    size = float(gradient.norm() / exact.norm())
    return {"model": model.name, "row": row, "way": way, "cosine": f"{cosine:.4f}", "size": f"{size:.4f}"}


if __name__ == "__main__":
    main()
