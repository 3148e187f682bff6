"""30B and more: a 4-bit base of which two layers are on the card at a time; the others wait in a folder.

With enough RAM the system keeps the folder's files there, and the disk is read once.
"""

import argparse

from kitaeru import JapaneseModel, LoRAConfig, LoRAFinetuningTrainer, TrainingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tokyotech-llm/Llama-3.1-Swallow-70B-Instruct-v0.3")
parser.add_argument("--data", default="kunishou/databricks-dolly-15k-ja", help="a file, a folder or a Hub data set")
parser.add_argument("--output", default="runs/offload-70b", help="the run folder")
parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value of the recipe")
given = parser.parse_args()

model = JapaneseModel(given.model, load_in_4bit=True, device_map="auto", offload_folder="./offload")
config = TrainingConfig(
    effective_batch_size=64,
    max_length=1024,
    num_epochs=1,
    output_dir=given.output,
    recipe=given.set,
)
result = LoRAFinetuningTrainer(model, LoRAConfig(r=8), config).train(given.data)
print(result.metrics)
print(f"{result.path}, and a report: {result.report_path}")
