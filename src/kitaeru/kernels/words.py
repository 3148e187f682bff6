"""Numbers of 4 and 8 bits in the 32-bit words that a GPU's instructions take.

Triton moves numbers of 8 bits between threads one by one and looks 4 bits up in memory; these few instructions (PTX)
take two to eight at a time. Each works on words of its own, so it does not matter which thread holds which.
"""

from __future__ import annotations

from kitaeru.kernels.triton_or_none import tl, triton

# $2: two words' halves, each a pair of e4m3 numbers that lie side by side. $0: the first of each pair as bf16, times
# 2**-120 (its bits, the exponent where bf16 has it); $1: the second.
FP8_APART = """{
.reg .b32 bits, sign;
shl.b32 bits, $2, 4;
shl.b32 sign, $2, 8;
and.b32 bits, bits, 0x07f007f0;
and.b32 sign, sign, 0x80008000;
or.b32 $0, bits, sign;
shr.u32 bits, $2, 4;
and.b32 bits, bits, 0x07f007f0;
and.b32 sign, $2, 0x80008000;
or.b32 $1, bits, sign;
}"""
# The same of INT8, exact: 128 + its low 7 bits, less 128 or, where it is negative, 256.
INT8_APART = """{
.reg .b32 bits, sign, less;
mov.b32 less, 0xbf80bf80;
and.b32 bits, $2, 0x007f007f;
and.b32 sign, $2, 0x00800080;
or.b32 bits, bits, 0x43004300;
or.b32 sign, sign, 0x43004300;
fma.rn.bf16x2 $0, sign, less, bits;
shr.u32 bits, $2, 8;
and.b32 sign, bits, 0x00800080;
and.b32 bits, bits, 0x007f007f;
or.b32 bits, bits, 0x43004300;
or.b32 sign, sign, 0x43004300;
fma.rn.bf16x2 $1, sign, less, bits;
}"""
# $1 times $2, $3, $4 and $5, rounded to e4m3, in one word.
FP8_FOUR = """{
.reg .f32 a, b;
.reg .b16 low, high;
mul.f32 a, $1, $2;
mul.f32 b, $1, $3;
cvt.rn.satfinite.e4m3x2.f32 low, b, a;
mul.f32 a, $1, $4;
mul.f32 b, $1, $5;
cvt.rn.satfinite.e4m3x2.f32 high, b, a;
mov.b32 $0, {low, high};
}"""
# $2: eight places of 4 bits, the first of each byte in its high half. $0, $1: what stands there of the 16 bytes $3 to
# $6, four a word. A lookup by 3 bits in either half of the 16, and one by the fourth bit between the halves.
NF4_LOOKED_UP = """{
.reg .b32 places, high, lower, upper, which;
shr.u32 places, $2, 4;
shl.b32 high, $2, 4;
and.b32 places, places, 0x0f0f0f0f;
and.b32 high, high, 0xf0f0f0f0;
or.b32 places, places, high;
shr.u32 which, places, 1;
and.b32 which, which, 0x44444444;
or.b32 which, which, 0x32103210;
and.b32 places, places, 0x77777777;
prmt.b32 lower, $3, $4, places;
prmt.b32 upper, $5, $6, places;
prmt.b32 $0, lower, upper, which;
shr.u32 places, places, 16;
shr.u32 which, which, 16;
prmt.b32 lower, $3, $4, places;
prmt.b32 upper, $5, $6, places;
prmt.b32 $1, lower, upper, which;
}"""
# $4 to $7: rows of four bytes. $0 to $3: its columns.
CROSSED = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410;
prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410;
prmt.b32 $3, c, d, 0x7632;
}"""

if triton is not None:
    _fp8_apart, _int8_apart = tl.constexpr(FP8_APART), tl.constexpr(INT8_APART)
    _fp8_four, _nf4_looked_up, _crossed = tl.constexpr(FP8_FOUR), tl.constexpr(NF4_LOOKED_UP), tl.constexpr(CROSSED)

    @triton.jit
    def parted(pairs, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pairs of numbers in 8 bits (int16) as bf16, the first and the second of each; FP8 times 2**-120."""
        code: tl.constexpr = _fp8_apart if FP8 else _int8_apart
        first, second = tl.inline_asm_elementwise(code, "=&r,=&r,r", [pairs], (tl.int16, tl.int16), True, 2)
        return first.to(tl.bfloat16, bitcast=True), second.to(tl.bfloat16, bitcast=True)

    @triton.jit
    def scaled_code(code, at: tl.constexpr, by):  # type: ignore[no-untyped-def]
        """Four values of a code from `at` on, times `by`, as e4m3 in one word (int32)."""
        a, b, c, d = tl.load(code + at), tl.load(code + at + 1), tl.load(code + at + 2), tl.load(code + at + 3)
        return tl.inline_asm_elementwise(_fp8_four, "=r,r,r,r,r,r", [by, a, b, c, d], tl.int32, True, 1)

    @triton.jit
    def looked_up(packed, a, b, c, d):  # type: ignore[no-untyped-def]
        """Eight values of 4 bits (int32), NF4's order, by a table of 16 bytes in four words: two words."""
        return tl.inline_asm_elementwise(
            _nf4_looked_up, "=&r,=&r,r,r,r,r,r", [packed, a, b, c, d], (tl.int32, tl.int32), True, 1
        )

    @triton.jit
    def crossed(a, b, c, d):  # type: ignore[no-untyped-def]
        """Four rows of four bytes (int32) as their columns."""
        types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        return tl.inline_asm_elementwise(_crossed, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], types, True, 1)
