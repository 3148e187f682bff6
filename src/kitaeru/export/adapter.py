"""An adapter on a model that answers, wherever the model's parts lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr


def put_on(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter in the folder `adapter`, in evaluation mode.

    Raises:
        ModelError: it cannot be read or does not fit the model.
    """
    # PEFT would hand the whole model out anew if it saw that parts of it lie in RAM or on disk: they stay there.
    places = model.__dict__.pop("hf_device_map", None)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(
            tr("The adapter does not fit this model: {said}", said=str(error).splitlines()[0]),
            where=str(adapter),
            remedy=tr("adapter_config.json names the base it was trained on."),
        ) from error
    finally:
        if places is not None:
            model.hf_device_map = places
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            _follow(module)
    tuned.eval()
    return model


def _follow(layer: Any) -> None:
    """An adapter's own weights go where its layer computes, which is not where an offloaded layer's weights lie."""
    hook = getattr(layer.get_base_layer(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        return
    for name in layer.adapter_layer_names:
        part = getattr(layer, name)
        if hasattr(part, "to"):
            part.to(device)
