"""From a recipe to corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kitaeru.data.corpus import reasons
from kitaeru.data.prepare import Prepared, held_out, prepare
from kitaeru.errors import DataError
from kitaeru.recipe.types import Recipe


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def chats(path: Path, count: int, word: str = "質問", role: str = "user") -> str:
    lines = [
        {"messages": [{"role": role, "content": f"{word}{i}"}, {"role": "assistant", "content": f"答え{i}です。"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def run(tokenizer: Any, folder: Path, seq_len: int = 64, progress: Any = None, **data: Any) -> Prepared:
    recipe = Recipe.model_validate({"model": "bundled", "data": data})
    bad = folder / "bad_rows.jsonl"
    return prepare(recipe, tokenizer, seq_len=seq_len, bad_rows=bad, cache=folder / "cache", progress=progress)


def test_train_and_valid_files(tokenizer: Any, tmp_path: Path) -> None:
    train, valid = chats(tmp_path / "a.jsonl", 20), chats(tmp_path / "b.jsonl", 5, "検証")
    seen: list[tuple[str, int, int]] = []
    found = run(tokenizer, tmp_path, train=train, valid=valid, progress=lambda *a: seen.append(a))
    assert found.valid is not None
    assert (len(found.train), len(found.valid)) == (20, 5)
    assert found.facts.valid_examples == 5
    assert found.sample_rows[0].messages[0]["content"] == "検証0"
    assert tokenizer.decode(found.valid.example(0).input_ids).endswith("### 指示:\n検証0\n\n### 応答:\n答え0です。</s>")
    assert [r.rows for r in found.reports] == [20, 5]
    assert [(done, total) for _, done, total in seen][-1] == (5, 5)
    assert len({name for name, _, _ in seen}) == 2
    assert not (tmp_path / "bad_rows.jsonl").exists()


def test_a_share_is_held_out_by_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    found = run(tokenizer, tmp_path, train=chats(tmp_path / "a.jsonl", 20), valid_fraction=0.25)
    assert found.valid is not None
    assert (len(found.train), len(found.valid)) == (15, 5)
    train, valid = set(found.train.rows.tolist()), set(found.valid.rows.tolist())
    assert train | valid == set(range(1, 21))
    assert held_out(20, 0.25, 0)[1] == [row - 1 for row in sorted(valid)]
    assert held_out(20, 0.25, 1) != held_out(20, 0.25, 0)
    assert [len(part) for part in held_out(2, 0.01, 0)] == [1, 1]
    assert [len(part) for part in held_out(3, 0.99, 0)] == [1, 2]
    with pytest.raises(DataError, match="cannot be split"):
        held_out(1, 0.5, 0)


def test_sources_keep_their_weights(tokenizer: Any, tmp_path: Path) -> None:
    sources = [{"path": chats(tmp_path / "a.jsonl", 3), "weight": 2.0}, {"path": chats(tmp_path / "b.jsonl", 4)}]
    found = run(tokenizer, tmp_path, train=sources)
    assert found.train.weights == (2.0, 1.0)
    assert found.train.sources.tolist() == [0] * 3 + [1] * 4
    assert found.train.files == (sources[0]["path"], sources[1]["path"])


def test_the_second_time_comes_from_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    train = chats(tmp_path / "a.jsonl", 20)
    first = run(tokenizer, tmp_path, train=train)
    second = run(tokenizer, tmp_path, train=train)
    assert (first.train.cached, second.train.cached) == (False, True)
    assert first.train.fingerprint == second.train.fingerprint
    # Another length is a cheap cut of the same tokens.
    shorter = run(tokenizer, tmp_path, train=train, seq_len=int(first.train.lengths.max()) - 1)
    assert shorter.train.cached
    assert shorter.train.fingerprint != first.train.fingerprint


def test_the_recipe_s_system_message_is_used(tokenizer: Any, tmp_path: Path) -> None:
    found = run(tokenizer, tmp_path, train=chats(tmp_path / "a.jsonl", 2), system="短く答えて。")
    assert "短く答えて。" in tokenizer.decode(found.train.example(0).input_ids)


def test_rows_the_template_refuses_stop_or_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template, before = (
        "{% for m in messages %}{% if m['content'] == '質問3' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
        tokenizer.chat_template,
    )
    try:
        train = chats(tmp_path / "a.jsonl", 6)
        with pytest.raises(DataError, match="not this") as caught:
            run(tokenizer, tmp_path, train=train)
        assert caught.value.where == f"{train}:4"
        found = run(tokenizer, tmp_path, train=train, on_bad_row="skip")
    finally:
        tokenizer.chat_template = before
    assert found.train.left_out == {reasons()["refused"]: 1}
    assert found.train.rows.tolist() == [1, 2, 3, 5, 6]
    (line,) = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["row"] == 4


def test_bad_rows_of_both_splits_are_in_one_file(tokenizer: Any, tmp_path: Path) -> None:
    train, valid = chats(tmp_path / "a.jsonl", 3), chats(tmp_path / "b.jsonl", 3)
    for path in (train, valid):
        with Path(path).open("a") as file:
            file.write("{broken\n")
    run(tokenizer, tmp_path, train=train, valid=valid, on_bad_row="skip")
    lines = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(json.loads(line)["file"], json.loads(line)["row"]) for line in lines] == [(train, 4), (valid, 4)]
