"""Long examples, masks that teach nothing, fingerprints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kitaeru.data.corpus import Corpus, build, reasons
from kitaeru.data.tokenise import RefusedRow, Tokenised
from kitaeru.data.types import Origin, Row
from kitaeru.errors import DataError

SAID = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


def conversation(number: int) -> Row:
    return Row(Origin("c.jsonl", number), messages=SAID)


def text(number: int, trained_from: int = 0) -> Row:
    return Row(Origin("t.txt", number), text="…", trained_from=trained_from)


def corpus(masks: list[str], rows: list[Row], seq_len: int = 100, **options: Any) -> Corpus:
    """Tokens count up from 1; `x` in a mask is a trained token, `.` one that is not."""
    flat = "".join(masks)
    tokens = np.arange(1, len(flat) + 1, dtype=np.int32)
    offsets = np.cumsum([0, *map(len, masks)])
    bad = tuple(RefusedRow(i, "no", None) for i, m in enumerate(masks) if not m)
    tokenised = Tokenised(tokens, np.array([c == "x" for c in flat]), offsets, len(flat), bad)
    return build(tokenised, rows, [0] * len(rows), weights=(1.0,), seq_len=seq_len, **options)


def examples(found: Corpus) -> list[tuple[int, list[int], str]]:
    return [
        (e.origin.row, e.input_ids, "".join("x" if t else "." for t in e.trained))
        for e in (found.example(i) for i in range(len(found)))
    ]


def test_examples_know_their_tokens_and_origin() -> None:
    found = corpus(["..xx", "xxx"], [conversation(3), text(9)])
    # Nothing predicts the first token of a text.
    assert examples(found) == [(3, [1, 2, 3, 4], "..xx"), (9, [5, 6, 7], ".xx")]
    assert str(found.origin(1)) == "t.txt:9"
    assert found.lengths.tolist() == [4, 3]
    assert (found.facts.examples, found.facts.tokens, found.facts.longest) == (2, 7, 4)
    assert found.trained_tokens == 4
    assert found.left_out == {}
    assert found.ready("train").length_histogram == {"4": 2}


def test_the_ends_of_a_few_examples_end_where_training_does() -> None:
    found = corpus(["..xx", "....xx..", "...xxxxx", "..x"], [conversation(n) for n in range(4)])
    assert examples(found.ends(3, 4)) == [
        (0, [2, 3, 4], ".xx"),
        (1, [8, 9, 10], ".xx"),
        (2, [18, 19, 20], ".xx"),
        (3, [21, 22, 23], "..x"),
    ]
    assert [example[2] for example in examples(found.ends(100, 2))] == ["..xx", "...xxxxx"]


def test_conversations_are_truncated_and_texts_split() -> None:
    found = corpus(["..xxxx", "xxxxxxx"], [conversation(1), text(2)], seq_len=4)
    # Pieces of a text share one token, so that each token of it is predicted exactly once.
    assert examples(found) == [(1, [1, 2, 3, 4], "..xx"), (2, [7, 8, 9, 10], ".xxx"), (2, [10, 11, 12, 13], ".xxx")]
    assert found.left_out == {reasons()["truncate"]: 1, reasons()["split"]: 1}


def test_split_loses_no_target() -> None:
    for length in range(5, 30):
        found = corpus(["x" * length], [text(1)], seq_len=4)
        targets = [t for _, ids, mask in examples(found) for t, m in zip(ids, mask, strict=True) if m == "x"]
        assert targets == list(range(2, length + 1))


def test_a_completion_is_truncated_by_itself() -> None:
    assert examples(corpus(["..xxxx"], [text(1, trained_from=2)], seq_len=4)) == [(1, [1, 2, 3, 4], "..xx")]


def test_long_examples_are_dropped_when_asked() -> None:
    found = corpus(["..xxxx", "..x"], [conversation(1), conversation(2)], seq_len=4, long="drop")
    assert [row for row, _, _ in examples(found)] == [2]
    assert found.left_out == {reasons()["drop"]: 1}


def test_a_row_cut_before_its_answer_is_left_out_and_counted() -> None:
    found = corpus([".....xx", ".xx.xx"], [conversation(1), conversation(2)], seq_len=4)
    assert [row for row, _, _ in examples(found)] == [2]
    assert found.left_out == {reasons()["truncate"]: 2, reasons()["nothing_left"]: 1}


def test_pieces_without_a_target_are_left_out() -> None:
    found = corpus(["......xx"], [conversation(1)], seq_len=4, long="split")
    assert examples(found) == [(1, [4, 5, 6, 7], "...x"), (1, [7, 8], ".x")]
    assert found.left_out == {reasons()["split"]: 1}


def test_a_conversation_that_teaches_nothing_stops() -> None:
    with pytest.raises(DataError, match="No token") as caught:
        corpus(["..xx", "...."], [conversation(1), conversation(2)])
    assert caught.value.where == "c.jsonl:2"
    with pytest.raises(DataError, match="No token"):
        corpus(["x..."], [conversation(1)])  # a first token is no target


def test_a_conversation_trained_whole_stops_unless_asked_for() -> None:
    for mask in ("xxxx", ".xxx"):
        with pytest.raises(DataError, match="Every token") as caught:
            corpus([".xx.", mask], [conversation(1), conversation(2)])
        assert caught.value.where == "c.jsonl:2"
        assert len(corpus([mask], [conversation(1)], train_on="all")) == 1


def test_refused_rows_are_counted_and_no_rows_left_stops() -> None:
    found = corpus(["", ".xx.", ""], [conversation(1), conversation(2), conversation(3)])
    assert [row for row, _, _ in examples(found)] == [2]
    assert found.left_out == {reasons()["refused"]: 2}
    with pytest.raises(DataError, match="No example is left"):
        corpus([""], [conversation(1)])


def test_the_fingerprint_follows_the_content() -> None:
    rows = [conversation(1), conversation(2)]
    base = corpus(["..xx", ".xxx."], rows)
    assert base.fingerprint == corpus(["..xx", ".xxx."], [conversation(8), conversation(9)]).fingerprint
    assert base.fingerprint != corpus(["..xx", "..xx."], rows).fingerprint
    # The same tokens and masks, cut elsewhere.
    assert corpus(["..x.", "..x."], rows).fingerprint != corpus(["..x..", ".x."], rows).fingerprint
