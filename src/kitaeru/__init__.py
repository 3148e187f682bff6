"""kitaeru (鍛える): fine-tune large language models, Japanese ones first, on the GPUs you own.

Importing this package does not import torch, and neither do the names of `kitaeru.api` that it has.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitaeru.api import (
        AdvancedMultiGPUTrainer,
        FullFinetuningTrainer,
        JapaneseModel,
        LoRAConfig,
        LoRAFinetuningTrainer,
        MultiGPUTrainingConfig,
        QuantizationOptimizer,
        SupportedModel,
        TrainingConfig,
        TrainingResult,
        load_lora_model,
    )

try:
    __version__ = version("kitaeru")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "AdvancedMultiGPUTrainer",
    "FullFinetuningTrainer",
    "JapaneseModel",
    "LoRAConfig",
    "LoRAFinetuningTrainer",
    "MultiGPUTrainingConfig",
    "QuantizationOptimizer",
    "SupportedModel",
    "TrainingConfig",
    "TrainingResult",
    "__version__",
    "load_lora_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kitaeru' has no attribute {name!r}")
    from kitaeru import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
