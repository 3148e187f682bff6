"""What a run leaves behind: `adapter/` in PEFT's format, or `model/`; complete, verified, or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from kitaeru.engine.build import Trainee
from kitaeru.errors import TrainingError
from kitaeru.files import sync_directory, write_json
from kitaeru.i18n import tr
from kitaeru.model.load import model_source


def write_result(trainee: Trainee, run: Path) -> Path:
    """Write the adapter, or the whole model in its own dtype, with the tokenizer; the folder's path.

    It is written beside its place, opened again and compared with the weights in memory, and then renamed. All ranks
    call this, and the main one writes.

    Raises:
        TrainingError: what lies on disk is not what was trained, or it cannot be written.
    """
    try:
        return _write(trainee, run)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            tr("The result cannot be written: {error}", error=error),
            where=str(run),
            remedy=tr("Free space on this disk, then go on with --resume: the checkpoints are whole."),
        ) from error


def _write(trainee: Trainee, run: Path) -> Path:
    adapter = isinstance(trainee.model, PeftModel)
    target = run / ("adapter" if adapter else "model")
    strategy, held = trainee.strategy, trainee.held
    state = {} if adapter else strategy.model_state(held)
    trained = {name: strategy.gather(held, name, piece) for name, piece in trainee.named} if adapter else state
    trained = trainee.world.united(trained) if adapter else trained
    if not trainee.world.main:
        return target
    temporary = run / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if adapter:
        trainee.model.peft_config["default"].base_model_name_or_path = model_source(trainee.plan.recipe.model)
        trainee.model.save_pretrained(str(temporary), safe_serialization=True, state_dict=dict(trained))
    else:
        _save_model(trainee, state, temporary)
    trainee.tokenizer.save_pretrained(str(temporary))
    _compare({name: trained[name] for name in trainee.names}, temporary)
    readable = (temporary / "tokenizer_config.json").stat().st_mode  # safetensors makes its files private
    for file in temporary.glob("*.safetensors"):
        file.chmod(readable)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    sync_directory(run)
    return target


def _save_model(trainee: Trainee, whole: dict[str, torch.Tensor], folder: Path) -> None:
    model = trainee.causal_lm
    dtype = _own_dtype(trainee)
    state = {name: tensor.detach().to(dtype).cpu() for name, tensor in whole.items()}
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        state = {n: t for n, t in state.items() if not (n.startswith("lm_head") and head is embedding)}
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    # transformers notes how the model is held here: in fp32, and without the cache that training has no use for.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch."), "use_cache": True})


def _own_dtype(trainee: Trainee) -> torch.dtype:
    """The 16-bit type a model is shared in; fp32 where everything was computed in fp32 and nobody asked for less."""
    stored = trainee.stored_dtype
    if stored is not None:
        return stored
    return torch.float32 if trainee.plan.layout.precision == "fp32" else torch.bfloat16


def _compare(trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Every trained tensor must be in the files, equal up to the rounding of the stored dtype."""
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                stored[_plain(name)] = handle.get_tensor(name)
    for name, weight in trained.items():
        found = stored.get(_plain(name))
        if found is None or not torch.equal(found, weight.detach().cpu().to(found.dtype)):
            raise TrainingError(
                tr("The files in {folder} do not hold what was trained ({name}).", folder=folder.name, name=name),
                remedy=tr("The checkpoints are whole. Please report this."),
            )


def _plain(name: str) -> str:
    """A parameter's name without PEFT's wrapping words, which differ between memory and file."""
    for word in (".default", "base_model.model.", ".modules_to_save", ".original_module"):
        name = name.replace(word, "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
