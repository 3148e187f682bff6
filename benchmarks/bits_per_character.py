"""Bits per character on held-out Japanese: a language model beside a character n-gram model trained on the same text.

    python benchmarks/bits_per_character.py --ngram 5 --data DATA --out benchmarks/results/ngram-5.csv
    python benchmarks/bits_per_character.py --model bundled --data DATA --out benchmarks/results/bundled-bpc.csv

DATA is the folder that recipes/bundled/prepare.py writes: `pretrain-train.jsonl` and `pretrain-valid.jsonl`.

Both give every character of every validation document a probability, and the end of a document none. Both may spend
what they like on the first character: the n-gram model knows that a document starts, the language model sees <s>.
The language model is charged for the one way its tokenizer cuts the text, which is an upper bound of its true bits.
It reads windows of `--context` tokens, each beginning with <s>; all but the first carry `--stride` tokens of a
document's past, and only the tokens not yet scored count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from kneser_ney import UNICODE_CHARACTERS, KneserNey
from table import write

Document = dict[str, Any]


def read(path: Path) -> list[Document]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def ngram_bits(data: Path, order: int, documents: list[Document]) -> tuple[list[float], dict[str, Any]]:
    """Bits of each document under a Kneser–Ney model of the training text."""
    model = KneserNey([row["text"] for row in read(data / "pretrain-train.jsonl")], order)
    bits = [float(-np.log2(model.probabilities(row["text"])).sum()) for row in documents]
    known = set(model.characters)
    unknown = sum(character not in known for row in documents for character in row["text"])
    setup = (
        f"interpolated modified Kneser-Ney, character order {order}; unigrams interpolated with 1/(V+1), "
        f"V={len(known)} characters seen in training; each of {unknown} unseen characters drawn evenly from the other "
        f"{UNICODE_CHARACTERS - len(known)} of Unicode"
    )
    parameters = sum(int(np.count_nonzero(each.discounted)) for each in model.orders)
    return bits, {"model": f"{order}-gram", "parameters": parameters, "setup": setup}


def model_folder(name: str) -> str:
    if name != "bundled":
        return name
    from importlib.resources import files

    return str(files("kitaeru") / "assets" / "bundled")


def model_bits(
    name: str, context: int, stride: int, device: str, documents: list[Document]
) -> tuple[list[float], dict[str, Any]]:
    """Bits of each document under a causal language model (a Hub id, a folder, or `bundled`), in fp32."""
    import torch
    import transformers

    folder = model_folder(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    bits, tokens = [], 0
    for row in documents:
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens += len(ids)
        bits.append(sum(_windows(model, start, ids, context, stride, device)) / math.log(2))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    setup = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, fp32 on {device}; {tokens} tokens; "
        f"windows of {context} tokens starting with <s>, at least {stride} tokens of past later; end not scored"
    )
    return bits, {"model": name, "parameters": parameters, "setup": setup}


def _windows(model: Any, start: int, ids: list[int], context: int, stride: int, device: str) -> list[float]:
    """Nats of the tokens, window by window."""
    import torch

    nats, scored = [], 0
    while scored < len(ids):
        past = min(scored, stride)
        fresh = ids[scored : scored + context - past]
        window = [start, *ids[scored - past : scored], *fresh]
        with torch.inference_mode():
            logits = model(torch.tensor([window[:-1]], device=device)).logits[0, past:]  # [fresh, vocabulary]
        targets = torch.tensor(fresh, device=device)
        nats.append(float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")))
        scored += len(fresh)
    return nats


def table(documents: list[Document], bits: list[float], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for all of the text and one for each genre."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(documents):
        groups["all"].append(index)
        groups[row.get("genre", "text")].append(index)
    rows = []
    for genre, members in groups.items():
        characters = sum(len(documents[index]["text"]) for index in members)
        rate = sum(bits[index] for index in members) / characters
        measured = {"genre": genre, "documents": len(members), "characters": characters}
        rows.append({**facts, **measured, "bits_per_character": f"{rate:.4f}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per character on held-out Japanese text.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ngram", type=int, metavar="ORDER", help="train and score a character n-gram model")
    which.add_argument("--model", help="score a model: `bundled`, a folder or a Hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes/bundled/prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens of a window, <s> not counted among the scored"
    )
    parser.add_argument("--stride", type=int, default=1024, help="tokens of past that a later window carries")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not 0 <= options.stride < options.context:
        parser.error("--stride must be at least 0 and smaller than --context")
    documents = read(options.data / "pretrain-valid.jsonl")
    began = time.perf_counter()
    if options.ngram:
        bits, facts = ngram_bits(options.data, options.ngram, documents)
    else:
        bits, facts = model_bits(options.model, options.context, options.stride, options.device, documents)
    facts |= {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))}-core {platform.machine()}",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
    }
    rows = table(documents, bits, facts)
    write(options.out, rows)
    for row in rows:
        size, rate = f"{row['characters']:>7} characters", f"{row['bits_per_character']} bits/character"
        print(f"{row['model']:>12}  {row['genre']:<6} {size}  {rate}")


if __name__ == "__main__":
    main()
