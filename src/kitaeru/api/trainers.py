"""The trainers: a model, a config, `train(texts)`. Each makes a recipe, and what runs is what `kitaeru train` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kitaeru.api.configs import LoRAConfig, MultiGPUTrainingConfig, TrainingConfig, Values
from kitaeru.api.model import JapaneseModel, load_lora_model
from kitaeru.api.ranks import Show
from kitaeru.api.sources import Texts, is_named, source
from kitaeru.errors import CheckpointError, TrainingError, UsageError
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe
from kitaeru.report.history import History

if TYPE_CHECKING:
    from kitaeru.engine.place import Place

__all__ = ["AdvancedMultiGPUTrainer", "FullFinetuningTrainer", "LoRAFinetuningTrainer", "TrainingResult"]

Method = Literal["auto", "full", "lora", "qlora"]


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind. Everything is read from the run folder."""

    folder: Path
    """The run folder: recipe, plan, events, checkpoints, result, report."""

    @cached_property
    def history(self) -> History:
        """Everything that happened, as events."""
        return History.load(self.folder)

    @cached_property
    def plan(self) -> Plan:
        """What was planned: the effective recipe, the layout, its cost, the reasons."""
        return Plan.load(self.folder / "plan.json")

    @property
    def outcome(self) -> str:
        """ "finished" or "stopped_early"."""
        return self.history.finished.outcome if self.history.finished else "unknown"

    @property
    def path(self) -> Path:
        """The result: the folder of the adapter (PEFT's format) or of the whole model."""
        adapter = self.folder / "adapter"
        return adapter if adapter.is_dir() else self.folder / "model"

    @property
    def adapter_path(self) -> Path | None:
        """The adapter's folder; None after training all weights."""
        return self.path if self.path.name == "adapter" else None

    @property
    def report_path(self) -> Path:
        """The report, one HTML file."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> dict[str, float]:
        """The run in numbers.

        `train_loss` (of the last step, nats a token), `eval_loss` and `eval_loss_before` (of what was kept, and before
        training; with evaluation data), `steps`, `epochs`, `tokens`, `tokens_per_second`, `peak_bytes` (of one
        device), `seconds`.
        """
        past, found = self.history, dict[str, float]()
        if past.steps:
            last = past.steps[-1]
            found |= {"train_loss": last.loss, "steps": last.step, "epochs": last.epoch}
            found |= {"tokens": past.tokens, "tokens_per_second": past.tokens_per_second}
            found |= {"peak_bytes": past.peak_bytes}
        if past.after is not None:
            found["eval_loss"] = past.after.loss
        if past.before is not None:
            found["eval_loss_before"] = past.before.loss
        return found | {"seconds": past.seconds}

    def model(self, **options: Any) -> JapaneseModel:
        """The trained model, ready to answer; `options` are those of `JapaneseModel`.

        With an adapter, its base is stored as it was in training unless `options` say otherwise.
        """
        section = self.plan.recipe.model
        options.setdefault("trust_remote_code", section.trust_remote_code)
        if self.adapter_path is None:
            return JapaneseModel(self.path, **options)
        if not options.keys() & {"load_in_4bit", "load_in_8bit"}:
            base = self.plan.layout.base
            options |= {"load_in_4bit": base == "nf4", "load_in_8bit": base == "int8"}
        options.setdefault("revision", section.revision)
        if not options.get("load_in_8bit"):
            options.setdefault("offload_folder", self.plan.recipe.limits.offload_folder)
        return load_lora_model(JapaneseModel(section.name, **options), self.adapter_path)


class _Trainer:
    """What the trainers share: from a model, a config and texts to a recipe, and from that to a result."""

    config_type: ClassVar[type[TrainingConfig]] = TrainingConfig

    def __init__(self, model: JapaneseModel | str | Path, config: TrainingConfig | None) -> None:
        if not isinstance(model, JapaneseModel | str | Path):
            raise UsageError(
                tr("{kind} is no model that a trainer can take.", kind=type(model).__name__),
                remedy=tr("Give a JapaneseModel, a Hub id, a folder, or 'bundled'."),
            )
        if config is not None and not isinstance(config, TrainingConfig):
            raise UsageError(
                tr("{kind} is no config of a training.", kind=type(config).__name__),
                remedy=tr("Give a TrainingConfig or a MultiGPUTrainingConfig."),
            )
        self.model = model if isinstance(model, JapaneseModel) else JapaneseModel(model)
        self.config = config if config is not None else self.config_type()

    def _method_values(self) -> Values:
        """What is trained, and how the base is stored."""
        raise NotImplementedError

    def recipe(self, train_texts: Texts, eval_texts: Texts | None = None, *, output: Path | None = None) -> Recipe:
        """The recipe that `train` runs with the same arguments. Texts that have no file yet are written into the run
        folder, which is `output`, or else the config's `output_dir` or a new one.

        Raises:
            KitaeruError: as `train`, for everything that is known before training.
        """
        wish = self._wish({})
        folder = output or self._folder(wish)
        values: Values = {"output": str(folder), "data.train": [source(train_texts, folder / "data" / "train.jsonl")]}
        if eval_texts is not None:
            values["data.valid"] = [source(eval_texts, folder / "data" / "eval.jsonl")]
        return self._wish(values, _devices(wish))

    def train(
        self,
        train_texts: Texts,
        eval_texts: Texts | None = None,
        resume_from_checkpoint: bool | str | Path | None = None,
    ) -> TrainingResult:
        """Plan, train, and write the result and the report.

        Started by plain `python` this starts a process for each device itself; the script needs no
        `if __name__ == "__main__"`. Under `accelerate launch`, torchrun or srun it trains as one of their processes.

        Args:
            train_texts: a path (file or folder) or Hub id of data, a list of texts, a list of rows (`messages`,
                `instruction`/`input`/`output`, `prompt`/`completion` …), or one split of a `datasets.Dataset`.
            eval_texts: what to validate on, in the same forms; never trained.
            resume_from_checkpoint: True: go on from the newest good checkpoint of `output_dir`. A path: the same
                with that run folder, or with its newest checkpoint.

        Raises:
            RecipeError: values that cannot stand together; all of them at once.
            PlanError: nothing of this fits this machine; names the nearest that does.
            DataError: data that cannot be read.
            Interrupted: Ctrl-C or SIGTERM, after saving.
            KitaeruError: training cannot go on.
        """
        from kitaeru.api.runs import train

        again = self._earlier(resume_from_checkpoint)
        if self._main:
            wish = self.recipe(train_texts, eval_texts, output=again)
            restarted = self._place is not None and self._place.restarts > 0
            if again is None and not restarted and (Path(wish.output or "") / "events.jsonl").exists():
                raise UsageError(
                    tr("{folder} already holds a run.", folder=wish.output),
                    remedy=tr("Go on with it: train(…, resume_from_checkpoint=True), or choose another output_dir."),
                )
        else:
            wish = self._empty_recipe(train_texts)
        self.model.unload()  # the processes that train load it themselves
        folder = train(wish, resume=again is not None, show=Show(every=self.config.logging_steps))
        if folder is None:
            raise TrainingError(tr("The main process could not begin; it says why."))
        return TrainingResult(folder)

    # ---- the recipe -----------------------------------------------------------------------------------------------

    def _wish(self, more: Values, devices: int = 1) -> Recipe:
        """The recipe, for training on so many devices. Without data of its own it names none that is there."""
        model, config = self.model.recipe_values(), self.config.values(devices)
        values = {"data.train": "-", **model, **{path: value for path, value in config.items() if value is not None}}
        values |= self._method_values()
        extra = self.config.recipe
        named = dict(extra) if isinstance(extra, Mapping) else {}
        flags = [] if isinstance(extra, Mapping) else list(extra)
        return read(None, values={**values, **named, **more}, overrides=flags, source="Python").recipe

    def _folder(self, wish: Recipe) -> Path:
        """The run folder: the config's, or a new one."""
        from kitaeru.engine.run import run_folder

        named = wish.output or self.config.output_dir
        return run_folder(wish) if named is None else Path(named)

    @property
    def _place(self) -> Place | None:
        from kitaeru.engine.place import placed

        return placed()

    @property
    def _main(self) -> bool:
        return self._place is None or self._place.rank == 0

    def _empty_recipe(self, train_texts: Texts) -> Recipe:
        """For the processes that only wait for the main one's run folder: nothing of it is used."""
        name = str(train_texts) if is_named(train_texts) else "-"
        return Recipe.model_validate({"model": self.model.model_name, "data": {"train": name}})

    def _earlier(self, wished: bool | str | Path | None) -> Path | None:
        """The run folder to go on with; None for a new run."""
        if isinstance(wished, bool) or wished is None:
            if wished and self.config.output_dir is None:
                raise UsageError(
                    tr("Nothing says which run to go on with."), remedy=tr("Give output_dir, or the run's path.")
                )
            return Path(self.config.output_dir) if wished and self.config.output_dir is not None else None
        path = Path(wished)
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        if run != path and (not path.is_dir() or any(other.name > path.name for other in path.parent.glob("step-*"))):
            raise CheckpointError(
                tr("A run goes on from its newest checkpoint, and {name} is not that.", name=path.name),
                remedy=tr("Name the run folder {folder}.", folder=run),
            )
        if not (run / "plan.json").is_file():
            raise CheckpointError(
                tr("{folder} is not a run folder.", folder=run), remedy=tr("Name the folder that training named.")
            )
        return run


class FullFinetuningTrainer(_Trainer):
    """Trains every weight.

    Args:
        model: a `JapaneseModel`, or its name. Weights held in 4 or 8 bits cannot all be trained.
        config: how; also a `MultiGPUTrainingConfig`.
    """

    def __init__(self, model: JapaneseModel | str | Path, config: TrainingConfig | None = None) -> None:
        super().__init__(model, config)
        if self.model.base != "none":
            raise UsageError(
                tr("Weights that are all trained cannot be stored in 4 or 8 bits."),
                remedy=tr("Leave load_in_4bit and load_in_8bit out, or use LoRAFinetuningTrainer."),
            )

    def _method_values(self) -> Values:
        return {"method": "full"}


class LoRAFinetuningTrainer(_Trainer):
    """Trains an adapter on a frozen base: LoRA, and on a base in 4 bits QLoRA.

    Args:
        model: a `JapaneseModel`, or its name.
        lora_config: the adapter; a `use_qlora` in it holds the base in 4 bits, as the model's `load_in_4bit` does.
        config: how; also a `MultiGPUTrainingConfig`.
    """

    def __init__(
        self,
        model: JapaneseModel | str | Path,
        lora_config: LoRAConfig | None = None,
        config: TrainingConfig | None = None,
    ) -> None:
        super().__init__(model, config)
        self.lora = lora_config if lora_config is not None else LoRAConfig()
        _adapter_values(self.model, self.lora)

    def _method_values(self) -> Values:
        return _adapter_values(self.model, self.lora)


class AdvancedMultiGPUTrainer(_Trainer):
    """Trains on every device there is, the way the config's `strategy` says or the planner chooses.

    Args:
        model: a `JapaneseModel`, or its name.
        config: a `MultiGPUTrainingConfig`.
        lora: the adapter. None: `method` decides.
        method: without `lora`: "auto" (an adapter on the base as it is or, where only that fits, in 4 bits), "full",
            "lora" or "qlora".
    """

    config_type = MultiGPUTrainingConfig

    def __init__(
        self,
        model: JapaneseModel | str | Path,
        config: TrainingConfig | None = None,
        lora: LoRAConfig | None = None,
        *,
        method: Method = "auto",
    ) -> None:
        super().__init__(model, config)
        if lora is not None and method == "full":
            raise UsageError(
                tr("method='full' trains every weight, and `lora` asks for an adapter."),
                remedy=tr("Leave one of them out."),
            )
        self.lora, self.method = lora, method
        self._method_values()

    def _method_values(self) -> Values:
        if self.lora is not None:
            return _adapter_values(self.model, self.lora)
        base = self.model.base
        method = self.method
        if method == "auto" and base != "none":
            method = "qlora" if base == "nf4" else "lora"
        if method == "full" and base != "none":
            raise UsageError(
                tr("Weights that are all trained cannot be stored in 4 or 8 bits."),
                remedy=tr("Leave load_in_4bit and load_in_8bit out, or give lora=LoRAConfig(…)."),
            )
        return {"method": method, "model.quantize": None if base == "none" else base}


def _devices(wish: Recipe) -> int:
    """Devices that will train, for the size of the effective batch: counted as the planner counts them."""
    from kitaeru.engine.place import placed

    place = placed()
    if place is not None:
        return place.size
    if wish.strategy == "single":
        return 1
    if wish.limits.devices is not None:
        return wish.limits.devices
    from kitaeru.machine.probe import probe

    gpus = 0 if wish.limits.device == "cpu" else len(probe().devices)
    return gpus or (1 if wish.strategy == "auto" else 2)


def _adapter_values(model: JapaneseModel, lora: LoRAConfig) -> Values:
    """Method, base and adapter, where model and adapter agree about the base."""
    base = lora.base or model.base
    if lora.base is not None and model.base not in ("none", lora.base):
        raise UsageError(
            tr(
                "The adapter asks for a base in {wanted}, and the model is loaded in {held}.",
                wanted=base,
                held=model.base,
            ),
            remedy=tr("Leave load_in_4bit and load_in_8bit out, or use_qlora."),
        )
    method = "qlora" if base == "nf4" else "lora"
    return {"method": method, "model.quantize": None if base == "none" else base, **lora.values()}
