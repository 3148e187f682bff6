"""13B to 30B on two cards of 24 GB: a 4-bit base, its layers split over the cards, a small adapter."""

import argparse

from kitaeru import AdvancedMultiGPUTrainer, JapaneseModel, LoRAConfig, MultiGPUTrainingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="cyberagent/calm3-22b-chat")
parser.add_argument("--data", default="kunishou/databricks-dolly-15k-ja", help="a file, a folder or a Hub data set")
parser.add_argument("--output", default="runs/qlora-22b", help="the run folder")
parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value of the recipe")
given = parser.parse_args()

config = MultiGPUTrainingConfig(
    strategy="model_parallel",
    max_memory_per_gpu={0: "22GB", 1: "22GB"},
    effective_batch_size=64,
    max_length=1024,
    num_epochs=1,
    output_dir=given.output,
    recipe=given.set,
)
lora = LoRAConfig(use_qlora=True, qlora_4bit=True, r=8)
result = AdvancedMultiGPUTrainer(JapaneseModel(given.model), config, lora=lora).train(given.data)
print(result.metrics)
print(f"{result.path}, and a report: {result.report_path}")
