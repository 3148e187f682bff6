"""Instructions on words of small numbers, by what the PTX manual says that each of them does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kitaeru.kernels import words


def run(code: str, *inputs: int | float, outputs: int = 1) -> list[int]:
    """What the instructions leave in $0 and on; the rest of $ are inputs. Words as integers, fp32 as numbers."""
    values: dict[str, int | float] = {f"${outputs + place}": value for place, value in enumerate(inputs)}

    def read(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else int(values[name])

    for line in code.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        into, *given = [part.strip() for part in re.findall(r"\{[^}]*\}|[^,\s][^,]*", rest)]
        if name == "mul.f32":
            values[into] = float(np.float32(values[given[0]]) * np.float32(values[given[1]]))
        elif name == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = (e4m3(float(values[each])) for each in given)
            values[into] = high << 8 | low
        elif name == "fma.rn.bf16x2":
            a, b, c = ([bf16(read(each) >> shift & 0xFFFF) for shift in (0, 16)] for each in given)
            low, high = (bf16_bits(x * y + z) for x, y, z in zip(a, b, c, strict=True))
            values[into] = high << 16 | low
        elif name == "mov.b32" and given[0].startswith("{"):
            low, high = (read(each.strip()) for each in given[0].strip("{}").split(","))
            values[into] = high << 16 | low
        else:
            values[into] = WORDS[name](*(read(each) for each in given)) & 0xFFFFFFFF
    return [int(values[f"${place}"]) for place in range(outputs)]


def permuted(a: int, b: int, selector: int) -> int:
    """prmt: for each byte one of eight, by 3 bits; a fourth bit would copy its sign over the byte."""
    pool = [(b << 32 | a) >> 8 * place & 255 for place in range(8)]
    nibbles = [selector >> 4 * place & 15 for place in range(4)]
    chosen = [(255 if pool[n & 7] & 128 else 0) if n & 8 else pool[n] for n in nibbles]
    return sum(byte << 8 * place for place, byte in enumerate(chosen))


WORDS = {
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
}


def e4m3(value: float) -> int:
    return int(torch.tensor(value).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def bf16(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).double())


def bf16_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).bfloat16().view(torch.uint16))


def packed(numbers: list[int]) -> int:
    """Four bytes as a word, the first lowest."""
    return sum(byte << 8 * place for place, byte in enumerate(numbers))


@pytest.mark.parametrize(("code", "dtype", "times"), [
    (words.FP8_APART, torch.float8_e4m3fn, 2.0**-120), (words.INT8_APART, torch.int8, 1.0)
])  # fmt: skip
def test_pairs_of_8_bits_come_apart_as_bf16(code: str, dtype: torch.dtype, times: float) -> None:
    for number in range(256):
        four = [number, (number * 7 + 3) % 256, 255 - number, number ^ 0x5A]
        values = torch.tensor(four, dtype=torch.uint8).view(dtype).double() * times
        first, second = run(code, packed(four), outputs=2)
        found = [bf16(first & 0xFFFF), bf16(second & 0xFFFF), bf16(first >> 16), bf16(second >> 16)]
        assert torch.equal(torch.tensor(found, dtype=torch.float64), values) or values.isnan().any()


def test_a_code_is_scaled_and_rounded_as_torch_rounds() -> None:
    drawn = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    for by, *code in drawn.tolist():
        (word,) = run(words.FP8_FOUR, by, *code)
        expected = (torch.tensor(code) * torch.tensor(by)).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert word == packed(expected.view(torch.uint8).tolist())


def test_values_of_4_bits_are_looked_up_in_the_order_of_nf4() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        table, stored = generator.integers(0, 256, 16).tolist(), generator.integers(0, 256, 4).tolist()
        places = [place for byte in stored for place in (byte >> 4, byte & 15)]
        first, second = run(
            words.NF4_LOOKED_UP, packed(stored), *(packed(table[at : at + 4]) for at in (0, 4, 8, 12)), outputs=2
        )
        assert [first, second] == [packed([table[p] for p in places[:4]]), packed([table[p] for p in places[4:]])]


def test_four_rows_of_four_bytes_become_columns() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 4))
    columns = run(words.CROSSED, *(packed(row.tolist()) for row in rows), outputs=4)
    assert columns == [packed(column.tolist()) for column in rows.T]
