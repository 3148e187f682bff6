"""Which of up to three neighbours a program of a kernel works on, where one launch does all of them."""

from __future__ import annotations

from kitaeru.kernels.triton_or_none import tl, triton

if triton is not None:

    @triton.jit
    def located(tile, sizes, sizes_1, sizes_2, SIZE: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        """In which of up to three neighbours, cut into tiles of SIZE each, a tile lies, and which it is there. The last
        one's tiles have no end.
        """
        number = tile * 0
        if COUNT > 1:
            tiles = tl.cdiv(sizes, SIZE)
            if tile >= tiles:
                tile -= tiles
                number += 1
        if COUNT > 2:
            tiles = tl.cdiv(sizes_1, SIZE)
            if (number == 1) & (tile >= tiles):
                tile -= tiles
                number += 1
        return number, tile

    @triton.jit
    def picked(number, a, b, c, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        """The argument of neighbour `number` of COUNT."""
        if COUNT > 1:
            a = b if number == 1 else a
        if COUNT > 2:
            a = c if number == 2 else a
        return a
