"""TensorBoard files, through TensorBoard's own writer (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kitaeru.events import Devices, Evaluated, Event, RunStarted, Sample, Step
from kitaeru.report.metrics import metrics


class TensorBoard:
    """Writes scalars, samples and the recipe to `folder`.

    A resumed run starts a new file that tells TensorBoard to forget the steps that are run again.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._writer: Any = None
        self._mfu_of_rate = 0.0

    def __call__(self, event: Event) -> None:
        """Write `event`."""
        match event:
            case RunStarted():
                self._begin(event)
            case Step():
                share = {"train/mfu": event.tokens_per_second * self._mfu_of_rate} if self._mfu_of_rate else {}
                self._scalars(event.step, event.time, metrics(event) | share)
            case Evaluated() | Devices():
                self._scalars(event.step, event.time, metrics(event))
            case Sample():
                tag = "samples/" + " ".join(event.prompt.split())[:60]
                self._text(event.step, event.time, tag, f"**{event.prompt}**\n\n{event.answer}")

    def close(self) -> None:
        """Write what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin(self, event: RunStarted) -> None:
        # Imported here: it takes a third of a second, and only training needs it.
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close()
        self._mfu_of_rate = event.mfu_of_rate
        self._writer = EventFileWriter(str(self._folder), flush_secs=10)
        if event.resumed_step > 0:
            # A session that starts at step n makes readers drop what earlier files hold for n and later.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Record(wall_time=event.time, step=event.resumed_step + 1, session_log=start))
        else:
            recipe = json.dumps(self._config, ensure_ascii=False, indent=2)
            indented = "\n".join("    " + line for line in recipe.splitlines())
            self._text(0, event.time, "recipe", indented)

    def _scalars(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, wall_time, Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]))

    def _text(self, step: int, wall_time: float, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step, wall_time, text_pb(tag, text))

    def _add(self, step: int, wall_time: float, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        if self._writer is not None:
            self._writer.add_event(Record(wall_time=wall_time, step=step, summary=summary))
