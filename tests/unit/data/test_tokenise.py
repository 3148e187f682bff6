"""Tokenising many rows: order, processes, the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from kitaeru.data import tokenise as room
from kitaeru.data.chat import tokenise_row
from kitaeru.data.tokenise import Tokenised, cache_folder, content_key, tokenise
from kitaeru.data.types import Origin, Row
from kitaeru.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def chat(number: int, role: str = "user") -> Row:
    messages = ({"role": role, "content": f"質問{number}"}, {"role": "assistant", "content": f"答え{number}"})
    return Row(Origin("c.jsonl", number), messages=messages)


ROWS = [chat(i) if i % 3 else Row(Origin("t.txt", i), text=f"文章{i}です。") for i in range(700)]


def same(a: Tokenised, b: Tokenised) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "trained", "offsets"))


def test_tokens_are_those_of_each_row_in_order(tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    result = tokenise(ROWS, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert len(result.offsets) == len(ROWS) + 1
    for index in (0, 1, 255, 256, 511, 699):
        part = slice(result.offsets[index], result.offsets[index + 1])
        example = tokenise_row(ROWS[index], tokenizer)
        assert result.tokens[part].tolist() == example.input_ids
        assert result.trained[part].tolist() == example.trained
    assert seen == [(256, 700), (512, 700), (700, 700), (700, 700)]


def test_processes_give_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tokenise(ROWS, tokenizer, workers=1)
    monkeypatch.setattr(room, "_SMALL", 0)
    seen: list[int] = []
    together = tokenise(ROWS, tokenizer, workers=2, progress=lambda done, _: seen.append(done))
    assert same(alone, together)
    assert together.characters == alone.characters
    assert seen == sorted(seen)


def test_a_worker_that_dies_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SMALL", 0)
    monkeypatch.setattr(room, "_encode", lambda *_: __import__("os")._exit(9))  # inherited by the fork
    with pytest.raises(DataError, match="died"):
        tokenise(ROWS, tokenizer, workers=2)


def test_refused_rows_are_set_aside_with_their_index(tokenizer: Any) -> None:
    rows = [*ROWS[:300], chat(300, role="critic"), *ROWS[301:400]]
    result = tokenise(rows, tokenizer)
    assert [bad.row for bad in result.bad] == [300]
    assert "critic" in result.bad[0].what
    lengths = np.diff(result.offsets)
    assert np.flatnonzero(lengths == 0).tolist() == [300]


def test_the_cache_gives_back_what_was_computed(tokenizer: Any, tmp_path: Path) -> None:
    first = tokenise(ROWS, tokenizer, cache=tmp_path)
    second = tokenise(ROWS, tokenizer, cache=tmp_path)
    assert (first.cached, second.cached) == (False, True)
    assert same(first, second)
    assert second.characters == first.characters
    # Where rows came from is not part of their content.
    moved = [Row(Origin("elsewhere", 1), messages=r.messages, text=r.text) for r in ROWS]
    assert tokenise(moved, tokenizer, cache=tmp_path).cached


def test_everything_the_tokens_depend_on_is_in_the_key(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    keys = {content_key(ROWS, tokenizer, "assistant"), content_key(ROWS, tokenizer, "all")}
    keys.add(content_key(ROWS[::-1], tokenizer, "assistant"))
    keys.add(content_key([Row(Origin("t", 1), text="ab")], tokenizer, "assistant"))
    keys.add(content_key([Row(Origin("t", 1), text="ab", trained_from=1)], tokenizer, "assistant"))
    tokenizer.chat_template += " "
    keys.add(content_key(ROWS, tokenizer, "assistant"))
    tokenizer.add_tokens(["鍛える鍛える"])
    keys.add(content_key(ROWS, tokenizer, "assistant"))
    assert len(keys) == 7


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cache_is_rebuilt(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    first = tokenise(ROWS, tokenizer, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {
        "cut": good[:middle],
        "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "empty": b"",
        "other": b"{}" * 100,
    }
    path.write_bytes(bad[damage])
    again = tokenise(ROWS, tokenizer, cache=tmp_path)
    assert not again.cached
    assert same(first, again)
    assert tokenise(ROWS, tokenizer, cache=tmp_path).cached


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert not tokenise(ROWS[:5], tokenizer, cache=tmp_path / "file").cached


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KITAERU_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "tokens"
    monkeypatch.delenv("KITAERU_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "kitaeru" / "tokens"
