"""Talking to a model: a run's result, or any model; the base beside the tuned one if wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kitaeru.errors import ModelError
from kitaeru.export.stream import TextPieces
from kitaeru.i18n import tr
from kitaeru.model.adapt import read_adapter
from kitaeru.model.generate import Sampling, answer
from kitaeru.model.load import load_model
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.stream import load_streamed
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.layouts import DISK
from kitaeru.plan.types import Layout, Plan
from kitaeru.recipe.types import ModelSection


@dataclass
class Voice:
    """One model that can answer. `around` is entered while it does (it may switch an adapter off)."""

    name: str
    model: PreTrainedModel
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass
class Chat:
    """A conversation with one voice, or with two side by side; each keeps its own history."""

    tokenizer: PreTrainedTokenizerBase
    voices: list[Voice]
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget what was said."""
        self.histories.clear()

    def say(self, voice: Voice, text: str) -> Iterator[str]:
        """What `voice` answers to `text`, in pieces as they come. The answer joins its history when it is complete."""
        history = self.histories.setdefault(voice.name, [])
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": text}

        def generate(streamer: TextPieces) -> None:
            with voice.around():
                if self.tokenizer.chat_template is None:
                    answer(voice.model, self.tokenizer, text=text, sampling=self.sampling, streamer=streamer)
                else:
                    messages = [*system, *history, asked]
                    answer(voice.model, self.tokenizer, messages=messages, sampling=self.sampling, streamer=streamer)

        pieces = []
        for piece in in_pieces(self.tokenizer, generate):
            pieces.append(piece)
            yield piece
        history += [asked, {"role": "assistant", "content": "".join(pieces).strip()}]


def in_pieces(tokenizer: PreTrainedTokenizerBase, generate: Callable[[TextPieces], Any]) -> Iterator[str]:
    """The text that `generate` gives to a streamer, piece by piece as it comes; it runs in a thread of its own."""
    streamer = TextPieces(tokenizer)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer)
        except BaseException as error:  # must reach the caller's thread, whatever it is
            failure.append(error)
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    yield from streamer
    worker.join()
    if failure:
        raise failure[0]


def open_chat(target: str, *, compare: bool = False, quantize: str | None = None) -> Chat:
    """A chat with a run folder's result, a model folder, a Hub id or `bundled`.

    `compare` puts the run's base beside it. `quantize` is "nf4", "int8" or None (as the run was trained; none else).

    Raises:
        ModelError: nothing to talk to there.
    """
    quiet_libraries()
    folder = Path(target)
    if (folder / "plan.json").exists():
        return _open_run(folder, compare, quantize)
    if compare:
        raise ModelError(
            tr("{target} is not a run folder: there is no base to put beside it.", target=target),
            remedy=tr("Leave --compare out, or name a run folder."),
        )
    section = ModelSection(name=target)
    model = load_model(section, _layout(quantize or "none"), 0)
    return Chat(load_tokenizer(section), [Voice(target, model)])


def _open_run(folder: Path, compare: bool, quantize: str | None) -> Chat:
    plan = Plan.load(folder / "plan.json")
    section = plan.recipe.model
    layout = _layout(quantize or plan.layout.base)
    if (folder / "adapter").is_dir():
        tokenizer = load_tokenizer(section)
        base = load_model(section, layout, 0) if quantize or plan.layout.variant != DISK else _from_disk(plan, layout)
        tuned = read_adapter(base, folder / "adapter")
        tuned.eval()
        voices = [Voice(tr("tuned"), base)]
        if compare:
            voices.insert(0, Voice(tr("base"), base, tuned.disable_adapter))
        return Chat(tokenizer, voices)
    if (folder / "model").is_dir():
        result = ModelSection(name=str(folder / "model"), trust_remote_code=section.trust_remote_code)
        voices = [Voice(tr("tuned"), load_model(result, layout, 0))]
        if compare:
            voices.insert(0, Voice(tr("base"), load_model(section, layout, 0)))
        return Chat(load_tokenizer(result), voices)
    raise ModelError(
        tr("{folder} holds no finished result (no adapter/ and no model/).", folder=folder),
        remedy=tr("Finish it with: kitaeru train {folder} --resume", folder=folder),
    )


def _from_disk(plan: Plan, layout: Layout) -> PreTrainedModel:
    """The base of a run whose layers came from disk, as it was trained."""
    folder = plan.recipe.limits.offload_folder
    assert folder is not None
    device = torch.device("cuda", torch.cuda.current_device()) if layout.device == "cuda" else torch.device("cpu")
    return load_streamed(
        plan.recipe.model, base=layout.base, precision=layout.precision, device=device, folder=Path(folder)
    )


def _layout(base: str) -> Layout:
    cuda = torch.cuda.is_available()
    half = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp16"
    return Layout(
        strategy="single",
        method="lora",
        base=base,  # type: ignore[arg-type]
        precision=half if cuda else "fp32",  # type: ignore[arg-type]
        activations="keep",
        micro_batch_tokens=0,
        device="cuda" if cuda else "cpu",
    )
