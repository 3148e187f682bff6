"""A model in fewer bits, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kitaeru.api.model import JapaneseModel
from kitaeru.errors import UsageError
from kitaeru.i18n import tr

if TYPE_CHECKING:
    from kitaeru.export.quantize import Bits, Measured, Quantised

__all__ = ["QuantizationOptimizer"]


class QuantizationOptimizer:
    """Writes a model in 4 or 8 bits, and measures what that saves and loses on this machine.

    Args:
        model: a `JapaneseModel` that is not quantised, or a name.

    Raises:
        UsageError: a model in 4 or 8 bits, or one with an adapter on it.
    """

    def __init__(self, model: JapaneseModel | str | Path) -> None:
        self.model = model if isinstance(model, JapaneseModel) else JapaneseModel(model)
        if self.model.base != "none":
            raise UsageError(
                tr("{model} holds its weights in few bits already.", model=self.model.model_name),
                remedy=tr("Leave load_in_4bit and load_in_8bit out."),
            )
        if self.model.adapter is not None:
            raise UsageError(
                tr("A model with an adapter on it cannot be quantised as one."),
                remedy=tr("Merge it first: kitaeru export RUN --to merged; then quantise the merged folder."),
            )

    def quantize_to_4bit(self, out: str | Path) -> Quantised:
        """Write a copy in NF4 with double quantisation to the folder `out`, which must be empty or not there.

        Returns:
            Where it lies, its size, and how far its logits are from the original's. `JapaneseModel(out)` opens it.

        Raises:
            ModelError: the model cannot be loaded, or what was written is not it.
        """
        return self._write(4, out)

    def quantize_to_8bit(self, out: str | Path) -> Quantised:
        """Write a copy in LLM.int8 to the folder `out`; else as `quantize_to_4bit`."""
        return self._write(8, out)

    def benchmark_quantization(self, texts: Sequence[str] = ()) -> list[Measured]:
        """Load the model unquantised, in 8 and in 4 bits, one after another, and measure each on this machine.

        Args:
            texts: what the loss is measured on, beside a fixed Japanese paragraph (at most 256 tokens in all).

        Returns:
            For each: bytes of the weights, seconds to load, tokens/s of one answer, loss, distance of logits.

        Raises:
            ModelError: the model cannot be loaded.
        """
        from kitaeru.export.quantize import benchmark

        self.model.unload()
        return list(benchmark(self.model.section, texts))

    def _write(self, bits: Bits, out: str | Path) -> Quantised:
        from kitaeru.export.quantize import quantize

        self.model.unload()
        return quantize(self.model.section, bits, Path(out))
