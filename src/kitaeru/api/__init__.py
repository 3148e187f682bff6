"""The object face: models, configs and trainers, thin over the same recipe, plan and run as the command line.

    from kitaeru import AdvancedMultiGPUTrainer, JapaneseModel, LoRAConfig, MultiGPUTrainingConfig

    model = JapaneseModel("elyza/Llama-3-ELYZA-JP-8B", load_in_4bit=True)
    config = MultiGPUTrainingConfig(strategy="auto", effective_batch_size=64)
    result = AdvancedMultiGPUTrainer(model, config, lora=LoRAConfig(r=8)).train("my.jsonl")
    print(result.metrics["train_loss"], result.model().generate_japanese("自己紹介をしてください。"))

Importing it does not import torch.
"""

from kitaeru.api.configs import LoRAConfig, MultiGPUTrainingConfig, TrainingConfig
from kitaeru.api.model import JapaneseModel, SupportedModel, load_lora_model
from kitaeru.api.quantization import QuantizationOptimizer
from kitaeru.api.trainers import AdvancedMultiGPUTrainer, FullFinetuningTrainer, LoRAFinetuningTrainer, TrainingResult

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
    "load_lora_model",
]
