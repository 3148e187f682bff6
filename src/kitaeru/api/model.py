"""A model to talk to and to train."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, overload

from kitaeru.api.configs import Memory, Values, gigabytes, memory_of
from kitaeru.errors import KitaeruError, ModelError, UsageError
from kitaeru.i18n import tr
from kitaeru.recipe.types import ModelSection
from kitaeru.shape import catalogue

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kitaeru.export.chat import Chat
    from kitaeru.plan.types import Base, Precision

__all__ = ["JapaneseModel", "SupportedModel", "load_lora_model"]

_PRECISIONS: dict[str, Precision] = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16",
    "float32": "fp32", "fp32": "fp32", "float": "fp32",
}  # fmt: skip


class SupportedModel(NamedTuple):
    """A model that kitaeru knows by name. Any other causal language model that transformers loads works too."""

    name: str
    parameters: int
    """All parameters, tied ones once."""


class JapaneseModel:
    """A causal language model: Japanese ones first, any that transformers loads.

    Making one reads nothing. The weights are loaded at the first answer (or by `load_model`), and for training by the
    processes that train, each its own part.

    Args:
        model_name: a Hub id, a folder, or `bundled` (the small Japanese model inside kitaeru).
        device_map: where answers are computed. "auto": GPUs first, then RAM, then `offload_folder`; "cpu", "cuda", a
            GPU's number, or accelerate's own map of parts to devices. Training takes "cpu" and "cuda" from it; how
            several devices share a training is `MultiGPUTrainingConfig.strategy`.
        load_in_4bit: hold the weights in 4 bits (NF4 with double quantisation). Trained with an adapter: QLoRA.
        load_in_8bit: hold the weights in 8 bits (LLM.int8).
        torch_dtype: arithmetic: a torch dtype or its name. None: bf16 where the GPU has it, else fp16; fp32 on a CPU.
        offload_folder: where parts lie that fit neither into the GPUs nor into RAM. Answers read them from there when
            their turn comes; so does training with an adapter, layer by layer.
        use_flash_attention: take kitaeru's packed attention (flash kernels) where the model is known to allow it.
            False: torch's SDPA.
        gradient_checkpointing: compute activations again in training instead of keeping them. False leaves it to the
            planner, which does so where memory needs it.
        max_memory: what may be used, by GPU index and "cpu": `{0: "22GB", "cpu": "60GB"}`. "GB" are 10**9 bytes.
        revision: the Hub revision of model and tokenizer.
        trust_remote_code: run Python code that comes with the model.
        adapter: the folder of a PEFT adapter to put on it (`load_lora_model`).

    Raises:
        UsageError: arguments that contradict each other.
    """

    def __init__(
        self,
        model_name: str | Path,
        device_map: str | int | Mapping[str, Any] = "auto",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        offload_folder: str | Path | None = None,
        use_flash_attention: bool = True,
        gradient_checkpointing: bool = False,
        max_memory: Mapping[int | str, Memory] | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        adapter: str | Path | None = None,
    ) -> None:
        if load_in_4bit and load_in_8bit:
            raise UsageError(
                tr("`load_in_4bit` and `load_in_8bit` are both asked for."), remedy=tr("Leave one of them out.")
            )
        if load_in_8bit and offload_folder is not None:
            raise UsageError(
                tr("A model in 8 bits cannot have parts on disk."),
                remedy=tr("Take load_in_4bit with offload_folder, or leave the folder out."),
            )
        self.model_name = str(model_name)
        self.device_map = device_map
        self.load_in_4bit, self.load_in_8bit = load_in_4bit, load_in_8bit
        self.precision = _precision(torch_dtype)
        self.offload_folder = None if offload_folder is None else Path(offload_folder)
        self.use_flash_attention = use_flash_attention
        self.gradient_checkpointing = gradient_checkpointing
        self.max_memory = dict(max_memory) if max_memory is not None else None
        self.revision, self.trust_remote_code = revision, trust_remote_code
        self.adapter = None if adapter is None else Path(adapter)
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._chat: Chat | None = None

    def __repr__(self) -> str:
        bits = ", load_in_4bit=True" if self.load_in_4bit else ", load_in_8bit=True" if self.load_in_8bit else ""
        return f"JapaneseModel({self.model_name!r}{bits})"

    # ---- loading --------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Base:
        """How the weights are stored: "nf4", "int8" or "none"."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"

    @property
    def section(self) -> ModelSection:
        """The model as a recipe names it."""
        return ModelSection(
            name=self.model_name,
            revision=self.revision,
            attention="auto" if self.use_flash_attention else "sdpa",
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, loaded if it is not yet. With an adapter, the base that carries it."""
        return self.load_model()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded if it is not yet."""
        return self.load_tokenizer()

    def load_model(self) -> PreTrainedModel:
        """Load the weights for answers, once; the transformers model.

        Raises:
            ModelError: it cannot be found or loaded, or there is no room for it.
        """
        if self._model is None:
            from kitaeru.export.adapter import put_on
            from kitaeru.model.load import load_to_answer
            from kitaeru.model.quiet import quiet_libraries

            quiet_libraries()
            device_map = self.device_map
            precision = self.precision or _usual_precision(device_map)
            if self.load_in_4bit and self.offload_folder is not None and not self._fits(precision):
                model = self._from_disk(precision, self.offload_folder)
            else:
                model = load_to_answer(
                    self.section,
                    base=self.base,
                    precision=precision,
                    device_map=device_map if isinstance(device_map, str) else _as_map(device_map),
                    max_memory=self._room(),
                    offload_folder=self.offload_folder,
                )
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._model = put_on(model, self.adapter) if self.adapter is not None else model
        return self._model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, once.

        Raises:
            ModelError: it cannot be found or loaded.
        """
        if self._tokenizer is None:
            from kitaeru.model.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self.section)
        return self._tokenizer

    def load_with_fallback(self, fallbacks: Sequence[str | Path]) -> Self:
        """Load the model, or else the first of `fallbacks` that can be loaded; `model_name` is then that one.

        Raises:
            ModelError: not one of them can be loaded; says why for each.
        """
        import torch

        wanted, reasons = self.model_name, []
        for name in (wanted, *map(str, fallbacks)):
            self.model_name = name
            try:
                self.load_model()
                self.load_tokenizer()
                return self
            except (KitaeruError, torch.OutOfMemoryError, MemoryError) as error:
                self.unload()
                reasons.append(f"{name}: {str(error).splitlines()[0]}")
        self.model_name = wanted
        raise ModelError(
            tr("None of these models can be loaded:") + "".join(f"\n  {reason}" for reason in reasons),
            remedy=tr("JapaneseModel.list_supported_models() lists models and their sizes."),
        )

    def unload(self) -> None:
        """Let go of the weights; they are loaded again when they are needed."""
        self._model = self._tokenizer = self._chat = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @staticmethod
    def list_supported_models() -> list[SupportedModel]:
        """The models that kitaeru knows by name, the smallest first."""
        from kitaeru.shape import ModelShape

        found = [SupportedModel(e.name, ModelShape.from_config(e.config, e.name).parameters()) for e in catalogue()]
        return sorted(found, key=lambda model: (model.parameters, model.name))

    def _fits(self, precision: Precision) -> bool:
        """Whether the weights in 4 bits find room on the GPUs (without one, in RAM) with a tenth to spare."""
        from kitaeru.machine.probe import probe
        from kitaeru.model.load import config_dict, load_config
        from kitaeru.plan.stored import weight_bytes
        from kitaeru.plan.types import Layout
        from kitaeru.shape import ModelShape

        machine, limits = probe(), self._room() or {}
        layout = Layout("single", "qlora", "nf4", precision, "keep", 0, "cuda" if machine.devices else "cpu")
        needed = sum(weight_bytes(layout, ModelShape.from_config(config_dict(load_config(self.section)))))
        rooms = [min(device.free_bytes, limits.get(i, device.free_bytes)) for i, device in enumerate(machine.devices)]
        if not rooms or self.device_map == "cpu":
            rooms = [min(machine.host_free_bytes, limits.get("cpu", machine.host_free_bytes))]
        return bool(needed * 1.1 <= sum(rooms))

    def _from_disk(self, precision: Precision, folder: Path) -> PreTrainedModel:
        """The model in 4 bits with its layers in `folder`; accelerate has a way for whole weights only."""
        import torch

        from kitaeru.model import attention
        from kitaeru.model.stream import load_streamed

        on_gpu = torch.cuda.is_available() and self.device_map != "cpu"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        model = load_streamed(self.section, base="nf4", precision=precision, device=device, folder=folder)
        if model.config._attn_implementation == attention.NAME:  # for packed rows; one answer is no packed row
            model.set_attn_implementation(attention.own_kernel(model.config))
        model.eval()
        return model

    def _room(self) -> dict[int | str, Any] | None:
        if self.max_memory is None:
            return None
        return {place: int(gigabytes(limit) * 10**9) for place, limit in self.max_memory.items()}

    # ---- answers --------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, *, streaming: Literal[False] = False, **sampling: Any) -> str: ...

    @overload
    def generate(self, prompt: str, *, streaming: Literal[True], **sampling: Any) -> Iterator[str]: ...

    def generate(self, prompt: str, *, streaming: bool = False, **sampling: Any) -> str | Iterator[str]:
        """What the model writes after `prompt`, which it sees as it is, without a chat template.

        Args:
            prompt: a text to continue.
            streaming: give the text in pieces as they come, as an iterator.
            **sampling: `max_new_tokens` (256), `temperature` (0: the likeliest token), `top_p` (0.95) and
                `repetition_penalty` (the model's own).

        Raises:
            ModelError: the model cannot be loaded.
            UsageError: an unknown name in `sampling`.
        """
        return self._answer({"text": prompt}, streaming, sampling)

    @overload
    def generate_japanese(
        self,
        instruction: str,
        input: str | None = None,
        *,
        system: str | None = None,
        streaming: Literal[False] = False,
        **sampling: Any,
    ) -> str: ...

    @overload
    def generate_japanese(
        self,
        instruction: str,
        input: str | None = None,
        *,
        system: str | None = None,
        streaming: Literal[True],
        **sampling: Any,
    ) -> Iterator[str]: ...

    def generate_japanese(
        self,
        instruction: str,
        input: str | None = None,
        *,
        system: str | None = None,
        streaming: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """The model's answer to an instruction, in its chat template (if it has none: to the bare text).

        Args:
            instruction: what to do.
            input: what to do it with; it follows the instruction after an empty line, as in training.
            system: a system message.
            streaming: as of `generate`.
            **sampling: as of `generate`.

        Raises:
            ModelError: the model cannot be loaded.
        """
        text = "\n\n".join(part for part in (instruction, input or "") if part.strip())
        if self.tokenizer.chat_template is None:
            return self._answer({"text": text}, streaming, sampling)
        messages = [{"role": "system", "content": system}] if system else []
        return self._answer({"messages": [*messages, {"role": "user", "content": text}]}, streaming, sampling)

    @overload
    def chat(
        self, message: str, *, system: str | None = None, streaming: Literal[False] = False, **sampling: Any
    ) -> str: ...

    @overload
    def chat(
        self, message: str, *, system: str | None = None, streaming: Literal[True], **sampling: Any
    ) -> Iterator[str]: ...

    def chat(
        self, message: str, *, system: str | None = None, streaming: bool = False, **sampling: Any
    ) -> str | Iterator[str]:
        """The model's answer in a conversation that it remembers; `reset_chat` forgets it.

        `system` is the system message from now on. The others are those of `generate`.
        """
        from kitaeru.export.chat import Chat, Voice

        if self._chat is None:
            self._chat = Chat(self.tokenizer, [Voice(self.model_name, self.model)])
        if system is not None:
            self._chat.system = system
        self._chat.sampling = _sampling(sampling)
        pieces = self._chat.say(self._chat.voices[0], message)
        return pieces if streaming else "".join(pieces).strip()

    def reset_chat(self) -> None:
        """Forget the conversation."""
        self._chat = None

    def _answer(self, asked: dict[str, Any], streaming: bool, sampling: dict[str, Any]) -> str | Iterator[str]:
        from kitaeru.export.chat import in_pieces
        from kitaeru.model.generate import answer

        model, tokenizer, chosen = self.model, self.tokenizer, _sampling(sampling)
        if not streaming:
            return answer(model, tokenizer, sampling=chosen, **asked)
        return in_pieces(
            tokenizer, lambda streamer: answer(model, tokenizer, sampling=chosen, streamer=streamer, **asked)
        )

    # ---- training -------------------------------------------------------------------------------------------------

    def recipe_values(self) -> Values:
        """The recipe's values by path that this model stands for.

        Raises:
            UsageError: something that answers can have and training cannot.
        """
        if self.adapter is not None:
            raise UsageError(
                tr("A model with an adapter on it is not trained further as it is."),
                remedy=tr("Merge it first: kitaeru export RUN --to merged; then train the merged folder."),
            )
        device, count = self._training_device()
        limits = self.max_memory or {}
        on_gpus = {place: limit for place, limit in limits.items() if isinstance(place, int)}
        return {
            "model.name": self.model_name,
            "model.revision": self.revision,
            "model.attention": None if self.use_flash_attention else "sdpa",
            "model.trust_remote_code": self.trust_remote_code or None,
            "train.precision": self.precision,
            "limits.device": device,
            "limits.devices": len(on_gpus) or count,
            "limits.checkpointing": True if self.gradient_checkpointing else None,
            "limits.memory_gb": memory_of(on_gpus) if on_gpus else None,
            "limits.ram_gb": gigabytes(limits["cpu"]) if "cpu" in limits else None,
            "limits.offload_folder": None if self.offload_folder is None else str(self.offload_folder),
        }

    def _training_device(self) -> tuple[str | None, int | None]:
        """Which kind of device trains and how many, as far as `device_map` says."""
        wished = self.device_map
        if wished in ("auto", "balanced", "balanced_low_0", "sequential"):
            return None, None
        if wished in ("cpu", "cuda"):
            return str(wished), None
        if wished in (0, "cuda:0"):
            return "cuda", 1
        raise UsageError(
            tr("device_map={wished!r} says where answers are computed; training needs another word.", wished=wished),
            remedy=tr("Use device_map='auto' and MultiGPUTrainingConfig(strategy='model_parallel', …)."),
        )


def load_lora_model(base: JapaneseModel | str | Path, adapter: str | Path) -> JapaneseModel:
    """`base` with the adapter that lies in the folder `adapter` (PEFT's format, or a run folder), ready to answer.

    Raises:
        ModelError: there is no adapter, or it does not fit the base (when the weights are loaded).
    """
    folder = Path(adapter)
    if (folder / "adapter" / "adapter_config.json").is_file():
        folder = folder / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            tr("{folder} holds no adapter (no adapter_config.json).", folder=folder),
            remedy=tr("Name the `adapter` folder of a run, or another folder in PEFT's format."),
        )
    given = base if isinstance(base, JapaneseModel) else JapaneseModel(base)
    return JapaneseModel(
        given.model_name,
        given.device_map,
        given.load_in_4bit,
        given.load_in_8bit,
        given.precision,
        given.offload_folder,
        given.use_flash_attention,
        given.gradient_checkpointing,
        given.max_memory,
        revision=given.revision,
        trust_remote_code=given.trust_remote_code,
        adapter=folder,
    )


def _precision(dtype: Any) -> Precision | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == "auto":
        return None
    if name not in _PRECISIONS:
        raise UsageError(
            tr("torch_dtype={name!r} is no dtype to compute in.", name=name),
            remedy=tr("Take bfloat16, float16 or float32, or leave it out."),
        )
    return _PRECISIONS[name]


def _usual_precision(device_map: Any) -> Precision:
    import torch

    if device_map == "cpu" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _as_map(device_map: int | Mapping[str, Any]) -> dict[str, Any]:
    return {"": device_map} if isinstance(device_map, int) else dict(device_map)


def _sampling(given: dict[str, Any]) -> Any:
    from dataclasses import fields

    from kitaeru.model.generate import Sampling

    known = [f.name for f in fields(Sampling)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(
            tr("Answers have no setting `{name}`.", name=unknown[0]),
            remedy=tr("Settings: {names}.", names=", ".join(known)),
        )
    return Sampling(**given)
