"""Compile every Triton kernel of the fused layer for a GPU that need not be there, and record what the compiler says.

    python benchmarks/compile_kernels.py --sm 86 90 --out benchmarks/results/kernels-compiled.csv

Registers a thread, bytes spilled, shared memory of a block (sm_86 has 99 KB), and the tensor-core instructions found
in the PTX. Of kernels that hold rows also what a thread issues for each number of a full tile, in all loops or in a
kernel without one: instructions, those of them that move numbers between threads (shared memory, shuffles, barriers),
and those of the slow pipe (exponentials, roots, conversions between integers and fractions: 16 a clock). Needs the
`triton` package and no GPU. Shapes are those of a Llama-3-8B layer.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from table import write
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kitaeru.kernels import adapter, copies, frozen, gated, norm, product, rotary, rows

FIELDS = (
    "kernel", "variant", "sm", "registers", "spilled_bytes", "shared_bytes", "issued", "moves", "slow", "instructions",
    "seconds",
)  # fmt: skip
EIGHT = {"fp8": "fp8e4nv", "int8": "i8"}


def sources(eight: str, sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """name, kernel, types of the arguments by name, constants, options."""
    kind, top, int8 = "*" + EIGHT[eight], 112.0 if eight == "fp8" else 127.0, eight == "int8"
    short, single, byte = "*bf16", "*fp32", "*u8"
    yield (
        "round", rows._round,
        {"x": short, "y": kind, "scale": single, "x_stride": "i32", "y_stride": "i32", "width": "i32"},
        {"TOP": top, "INT8": int8, "BLOCK": 4096}, {"num_warps": 8},
    )  # fmt: skip
    yield (
        "norm", norm._norm,
        {"x": short, "delta": short, "total": short, "weight": short, "y": kind, "scale": single, "rstd": single,
         "y_stride": "i32", "width": "i32", "eps": "fp32"},
        {"TOP": top, "INT8": int8, "ADD": True, "BLOCK": 4096}, {"num_warps": 8},
    )  # fmt: skip
    yield (
        "norm_backward", norm._norm_backward,
        {"dy": short, "y": kind, "y_scale": single, "rstd": single, "weight": short, "along": short, "dx": short,
         "rows": kind, "scale": single, "y_stride": "i32", "rows_stride": "i32", "width": "i32"},
        {"VARIANCE": norm.variance(torch.int8 if int8 else torch.float8_e4m3fn), "TURNED": int8, "WRITE": True,
         "TOP": top, "INT8": int8, "BLOCK": 4096}, {"num_warps": 8},
    )  # fmt: skip
    forward, backward = (gated.tile(14336, backward=back, turns=int8, caches=sm >= 89) for back in (False, True))
    yield (
        "gated", gated._gated,
        {"both": short, "rows": kind, "scale": single, "kept": kind, "gate_scale": single, "up_scale": single,
         "rows_stride": "i32", "width": "i32"},
        {"TOP": top, "INT8": int8, "KEEP_TOP": top, "KEEP_INT8": int8, "SILU": True, "BLOCK": forward.pop("BLOCK")},
        forward,
    )  # fmt: skip
    yield (
        "gated_backward", gated._gated_backward,
        {"upstream": short, "gates": kind, "gate_scale": single, "ups": kind, "up_scale": single,
         "kept_stride": "i32", "gradient": kind, "gradient_scale": single, "product": kind, "product_scale": single,
         "gradient_stride": "i32", "width": "i32"},
        {"SCALED": True, "TOP": top, "INT8": int8, "SILU": True, "BLOCK": backward.pop("BLOCK")}, backward,
    )  # fmt: skip
    for normed in (False, True):
        yield (
            f"rotate{'_normed' * normed}", rotary._rotate,
            {"qkv": short, "cos": short, "sin": short, "q_norm": short, "k_norm": short, "inverse": single,
             "stride": "i32", "angle_stride": "i32", "query": "i32", "count": "i32", "eps": "fp32"},
            {"NORM": normed, "D": 128, "HALF": 64, "HEADS": 64}, {"num_warps": 4},
        )  # fmt: skip
        yield (
            f"rotate_backward{'_normed' * normed}", rotary._rotate_backward,
            {"dq": short, "dk": short, "dv": short, "qkv": short, "inverse": single, "cos": short, "sin": short,
             "q_norm": short, "k_norm": short, "rows": kind, "scale": single,
             **dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "stride", "angle_stride",
                              "rows_stride", "query", "key"), "i32")},
            {"NORM": normed, "TOP": top, "INT8": int8, "D": 128, "BLOCK": 8192},
            {"num_warps": 8},
        )  # fmt: skip
    for name, turned in (("expand", False), ("expand_transposed", True)):
        yield (
            name, frozen._expand,
            {**dict.fromkeys(("data", "data_1", "data_2", "absmax", "absmax_1", "absmax_2"), byte),
             **dict.fromkeys(("absmax_scale", "absmax_scale_1", "absmax_scale_2"), single),
             **dict.fromkeys(("code", "absmax_code", "scale"), single),
             **dict.fromkeys(("absmax_offset", "absmax_offset_1", "absmax_offset_2"), "fp32"),
             **dict.fromkeys(("outputs", "outputs_1", "outputs_2", "out_stride", "inputs", "done", "adapter_row",
                              "adapter_rank", "width", "rank", "extra"), "i32"), "out": kind, "adapter": short},
            {"KIND": 2, "NESTED": True, "SCALED": True, "INT8": int8, "FP8": not int8, "TRANSPOSED": turned,
             "WEIGHTS": 3, "ROWS": 256 if turned and not int8 else 128, "BESIDE": not int8}, {"num_warps": 4},
        )  # fmt: skip
    yield (
        "project", adapter._project,
        {"x": kind, "scale": single, "p": kind, "p_scale": single, "out": short, "sums": single, "done": "*i32",
         **dict.fromkeys(("x_stride", "tokens", "width", "rank", "extra", "each", "parts"), "i32")},
        {"EIGHT": True, "FP8": not int8, "SPLIT": True, "ROWS": 64, "COLUMNS": 128, "RANK": 64,
         "EXTRA": 0 if int8 else 128},
        {"num_warps": 4, "num_stages": 3},
    )  # fmt: skip
    places = [f"{name}_{number}" for name in ("row", "rank", "column", "outputs") for number in range(3)]
    scalings = dict.fromkeys((f"scaling_{number}" for number in range(3)), "fp32")
    yield (
        "copy", copies._copy,
        {**dict.fromkeys(("a", "a_1", "a_2", "b", "b_1", "b_2"), single), "down": short, "up": short,
         "down_digits": kind, "up_digits": kind, "down_scale": single, "up_scale": single,
         **dict.fromkeys(("rank", "inputs", "outputs", *places), "i32"), **scalings},
        {"SHARES": 3, "TOP": 127.0 if int8 else 448.0, "INT8": int8, "BLOCK": 1024}, {"num_warps": 4},
    )  # fmt: skip
    yield (
        "outer", adapter._outer,
        {"p": short, "x": kind, "scale": single, "out": single,
         **dict.fromkeys(("p_stride", "x_stride", "tokens", "width", "rank", "each", *places), "i32")},
        {"EIGHT": True, "FP8": not int8, "SHARES": 3, "ROWS": 64, "COLUMNS": adapter.TILE, "RANK": 16},
        {"num_warps": 4, "num_stages": 2},
    )  # fmt: skip
    yield (
        "add_up", adapter._add_up,
        {"of_a": single, "of_b": single, "out": single,
         **dict.fromkeys(("parts_a", "parts_b", "rank", "width", "rank_b", "width_b", *places[3:]), "i32"),
         **scalings},
        {"TURNED_A": int8, "TURNED_B": int8, "SHARES": 3, "COLUMNS": adapter.FEW, "ROWS": 16},
        {"num_warps": 4},
    )  # fmt: skip
    if eight == "int8":
        for number, config in enumerate(product._CONFIGS):
            yield (
                f"product_int8_{number}", product._int8.fn,
                {"x": kind, "w": kind, "x_scale": single, "w_scale": single, "left": short, "right": short,
                 "out": short,
                 **dict.fromkeys(("tokens", "outputs", "inputs", "x_stride", "w_stride", "rank", "left_stride",
                                  "right_row", "right_rank"), "i32")},
                {"THIN": True, "RANK": 64, **config.kwargs},
                {"num_warps": config.num_warps, "num_stages": config.num_stages},
            )  # fmt: skip


def compiled(sm: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Any:
    """The kernel for one architecture; strides and sizes are multiples of 16, as in real models."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types.get(name, "").startswith("*") or types.get(name) == "i32"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", sm, 32), options=options)


def sums_begun_with(result: Any) -> set[str]:
    """Constants that products in fp32 start from. Anything but 0 is an addition that the compiler has moved into the
    product, where tensor cores drop the lowest bits of a large sum.
    """
    text = result.asm["ttgir"]
    constants = dict(re.findall(r"(%\w+) = arith\.constant dense<([^>]+)> : tensor<[^>]*xf32", text))
    products = re.findall(r"(?:tt\.dot|warp_group_dot) %\w+, %\w+, (%\w+)", text)
    return {constants[start] for start in products if start in constants}


def disassembled(result: Any, what: str) -> str:
    """What Triton's own cuobjdump says of the compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(result.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, what, path], capture_output=True, text=True, check=True)
    return said.stdout + said.stderr


def resources(result: Any) -> tuple[int, int]:
    """Registers and spilled bytes, from the assembler."""
    text = disassembled(result, "-res-usage")
    registers, local = re.search(r"REG:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    return int(registers[1]) if registers else 0, int(local[1]) if local else 0


def issued(result: Any, constants: dict[str, Any], options: dict[str, int]) -> tuple[float | str, ...]:
    """Instructions a number: all, those that move numbers between threads, those of the slow pipe. Empty for kernels
    that are no row kernels.
    """
    tile = constants.get("BLOCK") or 64 * constants.get("ROWS", 0) * ("KIND" in constants)
    if not tile:
        return "", "", ""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", disassembled(result, "-sass"))
    code = [(int(address, 16), name.split(".")[0], rest) for address, name, rest in found]
    targets = [(address, re.search(r"0x([0-9a-f]+)", rest)) for address, name, rest in code if name == "BRA"]
    loops = [(int(to[1], 16), address) for address, to in targets if to and int(to[1], 16) < address]
    inside = [name for address, name, _ in code if not loops or any(low <= address <= high for low, high in loops)]
    moving = [name for name in inside if name in ("LDS", "LDSM", "STS", "STSM", "SHFL", "BAR")]
    slow = [name for name in inside if name in ("MUFU", "I2F", "F2I", "F2F")]
    numbers = tile / (32 * options["num_warps"])
    return tuple(round(len(names) / numbers, 1) for names in (inside, moving, slow))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[86, 90])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = []
    for sm in arguments.sm:
        for eight in ("int8", "fp8") if sm >= 89 else ("int8",):
            for name, kernel, types, constants, options in sources(eight, sm):
                started = time.perf_counter()
                result = compiled(sm, kernel, types, constants, options)
                registers, spilled = resources(result)
                if (begun := sums_begun_with(result)) - {"0.000000e+00"}:
                    raise RuntimeError(f"{name} for sm_{sm}: a product's sum begins with {begun}")
                instructions = sorted(set(re.findall(r"(?:mma\.sync|wgmma\.mma_async)[\w.:]*", result.asm["ptx"])))
                seconds = round(time.perf_counter() - started, 1)
                said = (
                    name, eight, sm, registers, spilled, result.metadata.shared, *issued(result, constants, options),
                    " ".join(instructions), seconds,
                )  # fmt: skip
                found.append(dict(zip(FIELDS, said, strict=True)))
                print(found[-1], flush=True)
    write(arguments.out, found, FIELDS)


if __name__ == "__main__":
    main()
