"""7B to 13B on two cards of 24 GB: the layers are split over them, at most 22 GB of each."""

import argparse

from kitaeru import AdvancedMultiGPUTrainer, JapaneseModel, LoRAConfig, MultiGPUTrainingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="llm-jp/llm-jp-3-13b-instruct")
parser.add_argument("--data", default="kunishou/databricks-dolly-15k-ja", help="a file, a folder or a Hub data set")
parser.add_argument("--output", default="runs/model-parallel-13b", help="the run folder")
parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value of the recipe")
given = parser.parse_args()

config = MultiGPUTrainingConfig(
    strategy="model_parallel",  # "pipeline" splits it too, and keeps both cards busy
    max_memory_per_gpu={0: "22GB", 1: "22GB"},
    effective_batch_size=64,
    max_length=1024,
    num_epochs=1,
    output_dir=given.output,
    recipe=given.set,
)
trainer = AdvancedMultiGPUTrainer(JapaneseModel(given.model), config, lora=LoRAConfig(r=16))
result = trainer.train(given.data)
print(result.metrics)
print(f"{result.path}, and a report: {result.report_path}")
