"""Turn the source collections into the data of the bundled model and of the quickstart.

    python recipes/bundled/prepare.py SOURCE --out runs/bundled-data [--assets src/kitaeru/assets]

SOURCE holds `ja-pretrain/train.jsonl.gz`, `ja-text/valid.jsonl`, `ja-instruct/train.jsonl` and `…/valid.jsonl`. The
same source gives the same bytes. Written to --out: `pretrain-train|valid.jsonl` (text), `instruct-train|valid.jsonl`
(the share-alike rows, learnt by the bundled model), `quickstart-train|valid.jsonl` (the permissive rows, which it
never sees), `sources.csv` (every document and row the model learns from) and `prepared.json` (what was left out).
--assets also puts the quickstart's rows and `SOURCES.csv` where the package carries them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PERMISSIVE = re.compile(r"MIT|Apache|CC BY 4\.0")

# A training document goes when this share of it, or of a validation text, stands in the other word for word.
# Quotations of a sentence stay below it; excerpts and other versions of a work are far above.
TEXT_WINDOW, TEXT_SHARE = 24, 0.05
# Rows are short and full of stock phrases ("tell me how to…"), so they may share more before they count as the same.
ROW_WINDOW, ROW_SHARE = 8, 0.3
QUESTION_WINDOW, QUESTION_SHARE = 3, 0.5


def windows(text: str, size: int) -> set[str]:
    """All runs of `size` characters of the text, white space left out."""
    bare = re.sub(r"\s+", "", text)
    return {bare[start : start + size] for start in range(max(1, len(bare) - size + 1))}


def contained(one: set[str], other: set[str]) -> float:
    """The share of the smaller set that is in the larger one."""
    return len(one & other) / min(len(one), len(other))


def said(row: Row) -> str:
    """The conversation without its system message, which many rows have in common."""
    return "".join(message["content"] for message in row["messages"] if message["role"] != "system")


def question(row: Row) -> str:
    """The first thing the user says."""
    return str(next(message["content"] for message in row["messages"] if message["role"] == "user"))


def leave_out_copies(rows: list[Row], texts: list[set[str]], body: str | None) -> tuple[list[Row], list[str]]:
    """The rows that do not repeat one of the validation `texts`, and the ids of those that do."""
    places: dict[str, set[int]] = defaultdict(set)
    for index, text in enumerate(texts):
        for window in text:
            places[window].add(index)
    kept: list[Row] = []
    dropped: list[str] = []
    for row in rows:
        own = windows(row[body] if body else said(row), TEXT_WINDOW)
        shared = Counter(index for window in own if window in places for index in places[window])
        worst = max((count / min(len(own), len(texts[index])) for index, count in shared.items()), default=0.0)
        if worst >= TEXT_SHARE:
            dropped.append(row["id"])
        else:
            kept.append(row)
    return kept, dropped


def unseen(valid: list[Row], train: list[Row]) -> tuple[list[Row], list[str]]:
    """The validation rows that no training row nearly repeats, in question or as a whole; and the ids of the others."""
    known = [(windows(said(row), ROW_WINDOW), windows(question(row), QUESTION_WINDOW)) for row in train]
    kept: list[Row] = []
    dropped: list[str] = []
    for row in valid:
        whole, asked = windows(said(row), ROW_WINDOW), windows(question(row), QUESTION_WINDOW)
        copied = any(
            contained(whole, other) > ROW_SHARE or len(asked & like) / len(asked | like) > QUESTION_SHARE
            for other, like in known
        )
        if copied:
            dropped.append(row["id"])
        else:
            kept.append(row)
    return kept, dropped


def read(path: Path) -> list[Row]:
    """All rows of a .jsonl or .jsonl.gz file."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[Row]) -> None:
    """One JSON object a line, Japanese as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sources_csv(stages: dict[str, list[Row]]) -> str:
    """One line for each document and row that the model learns from."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = ("id", "title", "author", "credit", "licence", "source")
    writer.writerow(("stage", *columns))
    for stage, rows in stages.items():
        writer.writerows((stage, *(row.get(column, "") for column in columns)) for row in rows)
    return table.getvalue()


def prepare(source: Path) -> tuple[dict[str, list[Row]], dict[str, list[str]]]:
    """The data sets by file name, and the ids left out of each."""
    instruct = {part: read(source / "ja-instruct" / f"{part}.jsonl") for part in ("train", "valid")}
    permissive = {p: [row for row in rows if PERMISSIVE.search(row["licence"])] for p, rows in instruct.items()}
    share_alike = {p: [row for row in rows if not PERMISSIVE.search(row["licence"])] for p, rows in instruct.items()}
    quick_valid, near = unseen(permissive["valid"], permissive["train"])
    text_valid = read(source / "ja-text" / "valid.jsonl")
    held_out = [windows(row["text"], TEXT_WINDOW) for row in text_valid]
    held_out += [windows(said(row), TEXT_WINDOW) for row in quick_valid]
    texts, copied_texts = leave_out_copies(read(source / "ja-pretrain" / "train.jsonl.gz"), held_out, "text")
    rows, copied_rows = leave_out_copies(share_alike["train"], held_out, None)
    data = {
        "pretrain-train": texts,
        "pretrain-valid": text_valid,
        "instruct-train": rows,
        "instruct-valid": share_alike["valid"],
        "quickstart-train": permissive["train"],
        "quickstart-valid": quick_valid,
    }
    return data, {"pretrain-train": copied_texts, "instruct-train": copied_rows, "quickstart-valid": near}


def main() -> None:
    """Read the arguments, prepare and write."""
    parser = argparse.ArgumentParser(description="Prepare the data of the bundled model and of the quickstart.")
    parser.add_argument("source", type=Path, help="folder with ja-pretrain, ja-text and ja-instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/bundled-data"))
    parser.add_argument("--assets", type=Path, help="the package's assets folder, to write what is bundled")
    options = parser.parse_args()
    data, left_out = prepare(options.source)
    for name, rows in data.items():
        write(options.out / f"{name}.jsonl", rows)
    sources = sources_csv({"pretrain": data["pretrain-train"], "instruct": data["instruct-train"]})
    (options.out / "sources.csv").write_text(sources, encoding="utf-8")
    counts = {name: len(rows) for name, rows in data.items()}
    summary = json.dumps({"rows": counts, "left_out": left_out}, ensure_ascii=False, indent=2)
    (options.out / "prepared.json").write_text(summary + "\n", encoding="utf-8")
    print(summary)
    if options.assets:
        for part in ("train", "valid"):
            write(options.assets / "quickstart" / f"{part}.jsonl", data[f"quickstart-{part}"])
        (options.assets / "bundled" / "SOURCES.csv").write_text(sources, encoding="utf-8")


if __name__ == "__main__":
    main()
