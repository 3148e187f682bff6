"""The names under which trackers know the numbers of an event."""

from __future__ import annotations

from typing import Any

from kitaeru.events import Evaluated, Event, Step


def metrics(event: Event) -> dict[str, float]:
    """The numbers of a step or a validation by tracker name; empty for other events."""
    match event:
        case Step():
            return {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/tokens_per_second": event.tokens_per_second,
                "train/peak_bytes": float(event.peak_bytes),
                "train/epoch": event.epoch,
            }
        case Evaluated():
            return {"eval/loss": event.loss}
        case _:
            return {}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` with dotted keys, for trackers whose parameters are a flat table.

    >>> flat({"train": {"seed": 1}, "method": "lora"})
    {'train.seed': 1, 'method': 'lora'}
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
