"""What passes between the steps of the data room: rows, examples, micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

# Rows are read to make a plan too, and planning must not wait for torch.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Origin:
    """Where a row came from: the file (or Hub id) and its place, counted from 1 (a line, or a row of a table)."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True)
class Row:
    """One row in the one form everything is turned into.

    A conversation has `messages` (OpenAI's form: role, content, maybe tool_calls) and maybe `tools`; raw text has
    `text` and no messages. A prompt/completion row of plain strings is `text` with `trained_from`, the character where
    the completion begins.
    """

    origin: Origin
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    trained_from: int = 0


@dataclass(frozen=True)
class Example:
    """A tokenised example. `trained[i]` says whether token i is one the model learns to produce."""

    origin: Origin
    input_ids: list[int]
    trained: list[bool]


TENSORS = ("input_ids", "position_ids", "targets", "cu_seqlens", "counted")


@dataclass
class MicroBatch:
    """Examples laid end to end in one row of T tokens; none sees another.

    input_ids, position_ids, targets: int64 [1, T]. Positions start at 0 in every example. `targets[0, t]` is the token
    to predict at t (already shifted by one) or -100. cu_seqlens: int32 [examples + 1], where each example starts, and
    T last. `longest` is the longest example, or more. `counted`: int64 [R], every place whose target is not -100, and
    others after these in a row that is filled up (`data.batches`); None: to be looked for. `examples` are indices into
    the corpus.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int
    counted: torch.Tensor | None = None
    examples: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return int(self.input_ids.shape[1])

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int((self.targets != -100).sum())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        every = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same with its tensors changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **changed)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`; a GPU is not waited for."""
        pins = device.type == "cuda"
        return self.each(lambda t: (t.pin_memory() if pins and not t.is_cuda else t).to(device, non_blocking=True))
