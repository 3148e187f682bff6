"""An adapter on a model that answers, wherever the model's parts lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.adapt import read_adapter


def put_on(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter in the folder `adapter`, in evaluation mode.

    Raises:
        ModelError: it cannot be read or does not fit the model.
    """
    # PEFT would hand the whole model out anew if it saw that parts of it lie in RAM or on disk: they stay there.
    places = model.__dict__.pop("hf_device_map", None)
    try:
        with _stand_ins(model):
            tuned = read_adapter(model, adapter)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(
            tr("The adapter does not fit this model: {said}", said=str(error).splitlines()[0]),
            where=str(adapter),
            remedy=tr("adapter_config.json names the base it was trained on."),
        ) from error
    finally:
        if places is not None:
            model.hf_device_map = places
    tuned.eval()
    return model


@contextmanager
def _stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """PEFT puts an adapter where its layer's weights are. Weights that come from elsewhere when they are needed have
    empty ones in their place meanwhile, on the device that computes.
    """
    away = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.device.type == "meta"
    ]
    for module, name, weight in away:
        empty = torch.empty(0, dtype=weight.dtype, device=_computes_on(module))
        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for module, name, weight in away:
            module._parameters[name] = weight


def _computes_on(module: nn.Module) -> torch.device:
    """The device of accelerate's hook on a module."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return torch.device("cpu")
