"""A run's adapter, alone or merged into its base, as a folder that other programs open.

The weights that a merge yields are opened again and compared, by logits, with base and adapter as they were trained.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel

from kitaeru.errors import ModelError, UsageError
from kitaeru.events import Evaluated, Sample, read
from kitaeru.export.card import write_card
from kitaeru.export.place import new_folder, weight_files_bytes
from kitaeru.export.probe import SAME, logits_of, probe_ids
from kitaeru.export.quantize import stored_precision
from kitaeru.i18n import tr
from kitaeru.model.adapt import read_adapter
from kitaeru.model.experts import STACKS, PackedExperts
from kitaeru.model.head import distance
from kitaeru.model.load import config_dict, load_config, load_to_answer
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.types import Plan
from kitaeru.recipe.types import ModelSection
from kitaeru.shape import ModelShape

Into = Literal["auto", "trained", "original"]


@dataclass(frozen=True)
class Exported:
    """What was written. `apart`: how far its logits lie from base and adapter as trained, as a share of their size."""

    folder: Path
    weight_bytes: int
    into: Literal["trained", "original", ""]
    apart: float


def export_adapter(run: Path, target: Path) -> Exported:
    """Copy the run's adapter (PEFT's format) to `target`, with a model card.

    Raises:
        UsageError: the run has no adapter, or `target` is not empty.
    """
    plan, adapter = _adapter_of(run)
    with new_folder(target) as folder:
        for file in sorted(adapter.iterdir()):
            if file.name != "README.md":
                shutil.copy(file, folder)
        _card(folder, run, plan, "peft", {})
        size = weight_files_bytes(folder)
    return Exported(target, size, "", 0.0)


def export_merged(run: Path, target: Path, into: Into = "auto") -> Exported:
    """Merge the run's adapter into its base and write a whole model to `target`, in the base's own dtype.

    `into` matters where the base was trained on in 4 or 8 bits: "trained" takes the weights as those bits stood for
    (what the adapter has learnt to correct), "original" the ones before. "auto" is "trained".

    Raises:
        UsageError: the run has no adapter, or `target` is not empty.
        ModelError: the base cannot be loaded, or what was written does not answer as base and adapter do.
    """
    quiet_libraries()
    plan, adapter = _adapter_of(run)
    section, base = plan.recipe.model, plan.layout.base
    into = "original" if base == "none" else "trained" if into == "auto" else into
    precision, tokenizer = stored_precision(section), load_tokenizer(section)
    ids = probe_ids(tokenizer, _texts(run))
    place = {"": _device(plan)}

    trained = load_to_answer(section, base=base, precision=precision, device_map=place)
    replaced = _unpacked(trained) if into == "trained" else {}
    meant = logits_of(_with(trained, adapter), ids)
    del trained
    whole = load_to_answer(section, base="none", precision=precision, device_map=place)
    _put(whole, replaced)
    merged: Any = read_adapter(whole, adapter).merge_and_unload(safe_merge=True)
    with new_folder(target) as folder:
        merged.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
        del merged, whole
        again = load_to_answer(ModelSection(name=str(folder)), base="none", precision=precision, device_map=place)
        apart = distance(logits_of(again, ids), meant)
        if (base == "none" or into == "trained") and not apart <= SAME[precision]:
            raise ModelError(
                tr("The merged weights answer otherwise than base and adapter: logits {percent:.1f} % apart.",
                   percent=100 * apart),
                where=str(target),
                remedy=tr("Nothing was written. Use the adapter as it is, and please report this."),
            )  # fmt: skip
        facts = {tr("merged into"): _merged_into(base, into), tr("logits, apart from the adapter's"): f"{apart:.2%}"}
        _card(folder, run, plan, "transformers", facts)
        size = weight_files_bytes(folder)
    return Exported(target, size, into, apart)


def _merged_into(base: str, into: str) -> str:
    if base == "none":
        return tr("the base's own weights")
    if into == "trained":
        return tr("the weights that {base} stood for in training", base=base)
    return tr("the base's own weights, which were held in {base} in training", base=base)


def _adapter_of(run: Path) -> tuple[Plan, Path]:
    if not (run / "plan.json").is_file():
        raise UsageError(
            tr("{folder} is not a run folder.", folder=run), remedy=tr("Name the folder that training named.")
        )
    if (run / "model").is_dir():
        raise UsageError(
            tr("This run trained every weight: there is no adapter to merge."),
            remedy=tr("The whole model lies in {folder}.", folder=run / "model"),
        )
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise UsageError(
            tr("{folder} holds no finished result (no adapter/ and no model/).", folder=run),
            remedy=tr("Finish it with: kitaeru train {folder} --resume", folder=run),
        )
    return Plan.load(run / "plan.json"), run / "adapter"


def _texts(run: Path) -> list[str]:
    """What the run was asked and answered: where an adapter changes most."""
    path = run / "events.jsonl"
    asked = [event for event in read(path) if isinstance(event, Sample)] if path.is_file() else []
    return [text for event in asked for text in (event.prompt, event.answer) if text]


def _device(plan: Plan) -> str:
    """A GPU where the base in 16 bits fits with room for one matrix and the probe, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    shape_bytes = plan.chosen.trained_parameters * 4 + 2 * _parameters(plan)
    return "cuda" if torch.cuda.mem_get_info()[0] > 1.2 * shape_bytes + 2 * 10**9 else "cpu"


def _parameters(plan: Plan) -> int:

    return ModelShape.from_config(config_dict(load_config(plan.recipe.model))).parameters()


def _with(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    read_adapter(base, adapter).eval()
    return base


def _unpacked(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that packed ones stand for, by name, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            found[f"{name}.weight"] = dequantize_module_weight(module).detach().cpu()
        elif isinstance(module, PackedExperts):
            found |= {f"{name}.{stack}": module.whole(stack).cpu() for stack in STACKS}
    return found


@torch.no_grad()
def _put(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def _card(folder: Path, run: Path, plan: Plan, library: str, more: dict[str, str]) -> None:
    recipe, layout = plan.recipe, plan.layout
    losses = [event.loss for event in read(run / "events.jsonl") if isinstance(event, Evaluated)]
    facts = {
        tr("base"): recipe.model.name + (f" ({recipe.model.revision})" if recipe.model.revision else ""),
        tr("method"): layout.method + (f", {layout.base}" if layout.base != "none" else ""),
        tr("adapter"): f"r={recipe.lora.r}, alpha={recipe.lora.alpha:g}, {', '.join(recipe.lora.targets)}",
        tr("data"): ", ".join(Path(source.path).name for source in recipe.data.train),
    }
    if losses:
        facts[tr("validation loss")] = f"{losses[0]:.3f} → {min(losses[1:], default=losses[0]):.3f}"
    write_card(
        folder,
        title=run.resolve().name,
        base=recipe.model.name,
        tags=("lora", layout.method),
        library=library,
        facts=facts | more,
    )
