"""1B to 7B on two cards: each has the whole model and learns from its own examples (DDP).

The same under `python`, `torchrun --nproc-per-node 2` and `accelerate launch`.
"""

import argparse

from kitaeru import AdvancedMultiGPUTrainer, JapaneseModel, LoRAConfig, MultiGPUTrainingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="llm-jp/llm-jp-3-7.2b-instruct")
parser.add_argument("--data", default="kunishou/databricks-dolly-15k-ja", help="a file, a folder or a Hub data set")
parser.add_argument("--output", default="runs/ddp-7b", help="the run folder")
parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value of the recipe")
given = parser.parse_args()

config = MultiGPUTrainingConfig(
    strategy="ddp",
    batch_size=8,
    gradient_accumulation_steps=4,  # on two cards an effective batch of 64; or in one line: effective_batch_size=64
    max_length=1024,
    num_epochs=1,
    output_dir=given.output,
    recipe=given.set,
)
trainer = AdvancedMultiGPUTrainer(JapaneseModel(given.model), config, lora=LoRAConfig(r=16))
result = trainer.train(given.data)
print(result.metrics)
print(f"{result.path}, and a report: {result.report_path}")
