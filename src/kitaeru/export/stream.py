"""Text of a running generation, piece by piece, in any script.

transformers' own streamer waits for a space or a Chinese character before it lets text go: kana would arrive all at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

INCOMPLETE = "\ufffd"  # what the bytes of a character that is still being written decode to


class TextPieces(BaseStreamer):  # type: ignore[misc]
    """Given to `generate`; iterated from another thread. The prompt is skipped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._ids: list[int] = []
        self._sent = 0
        self._prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        """New tokens: first the whole prompt, then one token at a time."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self._ids += value.reshape(-1).tolist()
        text = self._text()
        if not text.endswith(INCOMPLETE):
            self._send(text)

    def end(self) -> None:
        """The generation is over."""
        self._send(self._text())
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get()) is not None:
            yield piece

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._queue.put(text[self._sent :])
            self._sent = len(text)
