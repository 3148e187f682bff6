"""The tables of predicted numbers in the guides, written between their marks by the planner itself.

python docs/guide/tables.py          write them anew
python docs/guide/tables.py --check  say whether they are what the planner says today
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.choose import survey
from kitaeru.plan.known import models
from kitaeru.plan.types import Candidate
from kitaeru.recipe.read import read
from kitaeru.report.wording import bytes_text, count_text, round_two
from kitaeru.shape import catalogue, find_shape

HERE = Path(__file__).parent
LANGUAGES = ("en", "ja")
MACHINES = (("RTX 3060", "32GB"), ("RTX 3090", "64GB"), ("2x RTX A5000", "128GB"), ("8x H100", "1TB"))
SHELF = (
    "sbintuitions/sarashina2.2-3b",
    "elyza/Llama-3-ELYZA-JP-8B",
    "tokyotech-llm/Swallow-13b-hf",
    "cyberagent/calm3-22b-chat",
    "codellama/CodeLlama-34b-hf",
    "tokyotech-llm/Llama-3.1-Swallow-70B-v0.1",
)
WORDS = {
    "model": "モデル",
    "method, strategy": "方法、戦略",
    "memory of a card": "カード当たりのメモリ",
    "tokens/s": "トークン/秒",
    "way": "構成",
    "idle": "空き",
    "state": "状態",
    "chosen": "選択",
    "fits": "収まる",
    "not built yet": "未実装",
    "too big": "大きすぎる",
    "does not fit": "収まらない",
}
Row = list[str]


def _rate(candidate: Candidate) -> str:
    speed = candidate.speed
    return "" if speed is None else "–".join(count_text(round_two(rate)) for rate in (speed.low, speed.high))


def by_machine() -> Iterator[Row]:
    """Which models fit which cards, and how."""
    yield ["model", *(gpus for gpus, _ in MACHINES)]
    entries = {entry.name: entry for entry in catalogue()}
    found = [list(models(parse_gpus(*machine), entries=[entries[name] for name in SHELF])) for machine in MACHINES]
    for rows in zip(*found, strict=True):
        cells = [
            f"{row.best.layout.method}, {row.best.layout.way}: {_rate(row.best)}" if row.best and row.built
            else "not built yet" if row.best else "does not fit"
            for row in rows
        ]  # fmt: skip
        yield [f"`{rows[0].name}`", *cells]


def ways(model: str) -> Iterator[Row]:
    """Every way to train a model on two RTX A5000."""
    yield ["way", "memory of a card", "tokens/s", "idle", "state"]
    pair: Hardware = parse_gpus("2x RTX A5000", "128GB")
    recipe = read(None, values={"model": model, "data.train": ["my.jsonl"]}).recipe
    found = survey(recipe, pair, find_shape(model))
    shown: set[str] = set()
    for candidate in found.candidates:
        layout = candidate.layout
        if layout.way in shown:
            continue
        shown.add(layout.way)
        chosen = found.plan is not None and candidate is found.plan.chosen
        state = (
            "chosen" if chosen else "too big" if not candidate.fits else "fits" if candidate.built else "not built yet"
        )
        idle = max(candidate.speed.idle, default=0.0) if candidate.speed else 0.0
        yield [f"`{layout.name}`", bytes_text(max(candidate.device_peaks)), _rate(candidate) if candidate.fits else "",
               f"{idle:.0%}" if candidate.fits else "", state]  # fmt: skip


TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    "by-machine": by_machine,
    "ways-8b": lambda: ways("elyza/Llama-3-ELYZA-JP-8B"),
    "ways-34b": lambda: ways("codellama/CodeLlama-34b-hf"),
}


def written(name: str, language: str) -> str:
    """A table as Markdown."""
    rows = [[_word(cell, language) for cell in row] for row in TABLES[name]()]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _word(cell: str, language: str) -> str:
    return WORDS.get(cell, cell) if language == "ja" else cell


def renewed(text: str, language: str) -> str:
    """A page with its tables as the planner has them."""
    mark = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda m: f"{m[1]}{written(m[2], language)}{m[3]}", text)


def main(check: bool) -> int:
    """Write or check the tables of all pages."""
    stale = []
    for language in LANGUAGES:
        for page in sorted((HERE / language).glob("*.md")):
            text = page.read_text(encoding="utf-8")
            new = renewed(text, language)
            if new != text:
                stale.append(page)
                if not check:
                    page.write_text(new, encoding="utf-8")
    for page in stale:
        print(page.relative_to(HERE), "is not what the planner says" if check else "written")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
