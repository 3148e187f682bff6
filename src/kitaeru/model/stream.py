"""A model larger than memory: its frozen layers lie on disk, and each is read when its turn comes.

A layer's weights are in memory while it computes and no longer. In training its forward pass is made twice, the second
time just before its backward pass, with the weights read again; what is trained (an adapter) and what lies outside of
the layers (embeddings, norms, head) stays in memory. Every layer has a file of its own in the folder, in the dtype or
the 4 bits it is computed from; a folder that is complete is used again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.files import write_json
from kitaeru.i18n import tr
from kitaeru.model.experts import PackedExperts, make_room, pack, recognised
from kitaeru.model.layers import layers_of
from kitaeru.model.load import DTYPES, attention_for, keep_trainable_packing, load_config, model_source, not_loaded
from kitaeru.plan.types import Base, Precision
from kitaeru.recipe.types import ModelSection

INDEX = "index.json"
SCALES = "#"  # parts a tensor's name from the name of what its 4 bits are unpacked with


def load_streamed(
    section: ModelSection, *, base: Base, precision: Precision, device: torch.device, folder: Path
) -> PreTrainedModel:
    """The model with its layers in `folder`, ready for an adapter or for answers.

    Memory: what lies outside of the layers, and one layer (two for a moment). `base` is "none" or "nf4".

    Raises:
        ModelError: it cannot be loaded, has no layers that are known to stand alone, or the folder cannot be written.
    """
    config = load_config(section)
    kernel = attention_for(section, config)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
    names = _layer_names(outline)
    if not names:
        raise ModelError(
            tr(
                "The layers of {model} are not known to stand alone, so they cannot come from disk.", model=section.name
            ),
            remedy=tr("Leave `limits.offload_folder` out."),
        )
    packs = base == "nf4" and any(recognised(module) for module in outline.modules())
    store = folder / _key(section, base, precision, packs)
    try:
        store.mkdir(parents=True, exist_ok=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_source(section),
            config=config,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=DTYPES[precision],
            attn_implementation=kernel,
            device_map=_places(outline, set(names), str(device)),
            offload_folder=str(store / "loading"),
            use_safetensors=True,
        )
        layers = [model.get_submodule(name) for name in names]
        if not (store / INDEX).is_file():
            _write(layers, store, base, precision, device)
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise ModelError(
            tr("The layers cannot be written: {error}", error=error),
            where=str(folder),
            remedy=tr("It needs room for the whole model; name another folder: --set limits.offload_folder=FOLDER"),
        ) from error
    except Exception as error:
        raise not_loaded(section, error) from error
    remove_hook_from_module(model, recurse=True)
    shutil.rmtree(store / "loading", ignore_errors=True)
    model.__dict__.pop("hf_device_map", None)
    if base == "nf4":
        model.is_loaded_in_4bit = True  # as transformers says it to PEFT
    shelves: list[Shelf] = []
    for number, layer in enumerate(layers):
        if base == "nf4":
            make_room_for_4_bits(layer, precision)
        shelves.append(Shelf(layer, _file(store, number), device))
    for number, shelf in enumerate(shelves):
        neighbours = [shelves[n].file for n in (number - 1, number + 1) if 0 <= n < len(shelves)]
        shelf.layer.forward = partial(_streamed, shelf, shelf.layer.forward, neighbours)
    model.get_input_embeddings().register_forward_hook(_let_gradients_through)
    keep_trainable_packing(model)
    gc.collect()
    return model


def _layer_names(model: PreTrainedModel) -> list[str]:
    """The layers' names in the model, in order."""
    found = layers_of(model)
    if found is None:
        return []
    inside = {id(layer) for layer in found[1]}
    return [name for name, module in model.named_modules() if id(module) in inside]


def _places(outline: nn.Module, layers: set[str], device: str) -> dict[str, Any]:
    """accelerate's map: layers on disk, everything else on the device."""
    found: dict[str, Any] = {}

    def cover(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if full in layers:
                found[full] = "disk"
            elif any(layer.startswith(full + ".") for layer in layers):
                cover(child, full)
            else:
                found[full] = device
        for own, _ in module.named_parameters(recurse=False):
            found[f"{name}.{own}" if name else own] = device

    cover(outline, "")
    return found


# ---- the folder ------------------------------------------------------------------------------------------------------


def _key(section: ModelSection, base: Base, precision: Precision, packs: bool) -> str:
    """A folder for each model and way to store it."""
    source = Path(model_source(section))
    # A local model may be written anew under the same name.
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source.glob("*.safetensors"))]
    told = json.dumps([str(source), section.revision, base, precision, stamps, *(["packed experts"] if packs else [])])
    name = section.name.rstrip("/").rpartition("/")[2]
    return f"{name}-{base}-{precision}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _file(store: Path, number: int) -> Path:
    return store / f"layer-{number:04d}.safetensors"


def _write(layers: list[nn.Module], store: Path, base: Base, precision: Precision, device: torch.device) -> None:
    """Every layer's weights into its file, one at a time; the index last: without it the folder is not complete."""
    for number, layer in enumerate(layers):
        tensors: dict[str, Tensor] = {}
        for name, owner, own in _weights(layer):
            with align_module_device(owner, torch.device("cpu")):
                tensor = getattr(owner, own).detach().to(DTYPES[precision], copy=True)
            if base == "nf4" and recognised(owner) is not None:
                parts = pack(tensor.to(device), "nf4")
                tensors |= {f"{name}_{part}" if part else name: packed.cpu() for part, packed in parts.items()}
            elif base == "nf4" and own == "weight" and isinstance(owner, nn.Linear):
                packed, state = bnb.functional.quantize_4bit(
                    tensor.to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                tensors[name] = packed.cpu()
                tensors |= {f"{name}{SCALES}{k}": t.cpu() for k, t in state.as_dict(packed=True).items()}
            else:
                tensors[name] = tensor.contiguous()
        save_file(tensors, _file(store, number))
    write_json(store / INDEX, {"layers": len(layers), "base": base, "precision": precision})


def _weights(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each weight: its name in the layer, the module that owns it, and its name there; packed experts' scales too."""
    for path, module in layer.named_modules():
        scales = module.named_buffers(recurse=False) if isinstance(module, PackedExperts) else ()
        for own, _ in (*module.named_parameters(recurse=False), *scales):
            yield f"{path}.{own}" if path else own, module, own


def make_room_for_4_bits(layer: nn.Module, precision: Precision) -> None:
    """Put bitsandbytes' linear layers in the place of torch's, and packed experts in that of whole ones; their weights
    come from the layer's file.
    """
    make_room(layer, "nf4")
    for path, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            with torch.device("meta"):
                packed = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=DTYPES[precision],
                    compress_statistics=True,
                    quant_type="nf4",
                )
            setattr(layer.get_submodule(parent), name, packed)


# ---- a layer at work -------------------------------------------------------------------------------------------------


class Shelf:
    """The weights of one layer: in its file, and in memory between `fetch` and `drop`."""

    def __init__(self, layer: nn.Module, file: Path, device: torch.device) -> None:
        self.layer, self.file, self.device = layer, file, device
        self.owners = {name: (owner, own) for name, owner, own in _weights(layer)}
        self.empty = {name: self._placeholder(owner, own) for name, (owner, own) in self.owners.items()}
        self.drop()

    def _placeholder(self, owner: nn.Module, own: str) -> Tensor:
        before = getattr(owner, own)
        nothing = torch.empty(0, dtype=before.dtype, device=self.device)
        if own in owner._buffers:
            return nothing
        if before.dim() > 1 and not isinstance(owner, nn.Linear | PackedExperts):  # PEFT adapts it by its shape
            return nn.Parameter(nothing.new_empty(1).expand(before.shape), requires_grad=False)
        if isinstance(before, bnb.nn.Params4bit):
            raw = nothing.to(torch.uint8)
            packed: nn.Parameter = bnb.nn.Params4bit(raw, requires_grad=False, quant_type="nf4", bnb_quantized=True)
            return packed
        return nn.Parameter(nothing, requires_grad=False)

    def fetch(self) -> None:
        """Read the weights.

        Raises:
            ModelError: the file is gone or damaged.
        """
        try:
            tensors = load_file(self.file, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                tr("A layer cannot be read: {error}", error=error),
                where=str(self.file),
                remedy=tr("Remove its folder; it is made again at the next start."),
            ) from error
        scales: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in tensors if SCALES in key]:
            name, _, part = key.partition(SCALES)
            scales.setdefault(name, {})[part] = tensors.pop(key)
        for name, tensor in tensors.items():
            owner, own = self.owners[name]
            if name in scales:
                owner._parameters[own] = bnb.nn.Params4bit.from_prequantized(
                    tensor, scales[name], requires_grad=False, device=self.device, module=owner
                )
            else:
                _put(owner, own, tensor)

    def drop(self) -> None:
        """Let go of them. What a backward pass still needs is held by its graph."""
        for name, (owner, own) in self.owners.items():
            _put(owner, own, self.empty[name])
            if isinstance(owner, bnb.nn.Linear4bit):
                owner.quant_state = None


def _put(owner: nn.Module, own: str, tensor: Tensor) -> None:
    if own in owner._buffers:
        owner._buffers[own] = tensor
    else:
        owner._parameters[own] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )


def _streamed(
    shelf: Shelf, forward: Callable[..., Any], neighbours: list[Path], hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The layer's forward pass with its weights there; where gradients will be wanted, again in the backward pass."""

    def run(*given: Any) -> Any:
        shelf.fetch()
        for file in neighbours:
            _read_ahead(file)
        try:
            return forward(*given, **kwargs)
        finally:
            shelf.drop()

    if torch.is_grad_enabled():
        # The other kind of checkpoint makes a graph in its first pass, and bitsandbytes' operations hold weights in it.
        return checkpoint(run, hidden, *args, use_reentrant=True)
    return run(hidden, *args)


def _read_ahead(file: Path) -> None:
    """Ask the system to have the file in its cache soon: the layer before or after is next."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


def _let_gradients_through(_: nn.Module, __: Any, output: Tensor) -> None:
    """A recomputed layer passes gradients on only if what goes in wants them, which a frozen embedding's output does
    not.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
