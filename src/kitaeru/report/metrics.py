"""The names under which trackers know the numbers of an event."""

from __future__ import annotations

from typing import Any

from kitaeru.events import Devices, Evaluated, Event, Reading, Step


def metrics(event: Event) -> dict[str, float]:
    """The numbers of a step, a validation or a look at devices by tracker name; empty for other events."""
    match event:
        case Step():
            shares = (
                {}
                if event.idle_share is None
                else {
                    "train/data_seconds": event.data_seconds,
                    "train/wait_seconds": event.wait_seconds,
                    "train/idle_share": event.idle_share,
                }
            )
            return {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/tokens_per_second": event.tokens_per_second,
                "train/peak_bytes": float(event.peak_bytes),
                "train/epoch": event.epoch,
                **shares,
            }
        case Devices():
            return {name: value for reading in event.readings for name, value in _of_device(reading).items()}
        case Evaluated():
            return {"eval/loss": event.loss}
        case _:
            return {}


def _of_device(reading: Reading) -> dict[str, float]:
    """What is known of a device: `devices/0/watts`."""
    names = (
        "utilisation",
        "memory_bytes",
        "watts",
        "celsius",
        "clock_mhz",
        "pcie_to_bytes_s",
        "pcie_from_bytes_s",
    )
    values = {name: getattr(reading, name) for name in names}
    return {f"devices/{reading.device}/{name}": float(v) for name, v in values.items() if v is not None}


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
