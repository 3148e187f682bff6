"""Is what was written what was meant? Logits of a text, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kitaeru.model.generate import first_device
from kitaeru.plan.types import Precision

# The opening of 夏目漱石『吾輩は猫である』 (1905), in the public domain.
TEXT = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは"
    "記憶している。吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。"
)
MOST_TOKENS = 256
# How far logits may lie apart that ought to be equal, as a share of their size: rounding of the arithmetic.
SAME: dict[Precision, float] = {"fp32": 1e-3, "bf16": 4e-2, "fp16": 1e-2}


def probe_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = ()) -> Tensor:
    """Token ids int64 [1, n], n at most 256: the texts and a fixed one."""
    ids: list[int] = []
    for text in (TEXT, *texts):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:MOST_TOKENS]])


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of `ids` int64 [1, n], fp32 [1, n, vocabulary] on the CPU, in evaluation mode."""
    model.eval()
    logits: Tensor = model(input_ids=ids.to(first_device(model)), use_cache=False).logits
    return logits.float().cpu()


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Mean loss in nats over the tokens of `ids` but the first."""
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
