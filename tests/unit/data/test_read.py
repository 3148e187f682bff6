"""Sources into rows: where they are from, what was skipped, when reading stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitaeru.data.read import gather, read
from kitaeru.errors import DataError
from kitaeru.recipe.types import SourceSection

GOOD = {"messages": [{"role": "user", "content": "問"}, {"role": "assistant", "content": "答"}]}
BAD = {"messages": [{"role": "user", "content": "問"}, {"role": "assistant", "content": ""}]}


def write(path: Path, rows: list[Any]) -> SourceSection:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return SourceSection(path=str(path))


def test_rows_keep_their_source_and_place(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", [GOOD, GOOD]), write(tmp_path / "b.jsonl", [{"text": "文"}])]
    reading = read(sources)
    assert reading.source_index == [0, 0, 1]
    assert [str(row.origin) for row in reading.rows] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/b.jsonl:1",
    ]
    assert [(report.kind, report.rows, report.skipped) for report in reading.reports] == [
        ("messages", 2, 0),
        ("text", 1, 0),
    ]


def test_stop_names_file_line_key_and_remedy(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [GOOD, BAD])
    with pytest.raises(DataError) as caught:
        read([source])
    error = caught.value
    assert error.where == f"{source.path}:2"
    assert error.what.startswith("`messages[1].content`")
    assert "on_bad_row: skip" in (error.remedy or "")
    assert error.exit_code == 2


def test_skip_writes_the_rows_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [GOOD, BAD, '{"messages": [', GOOD])
    kept = tmp_path / "run" / "bad_rows.jsonl"
    reading = read([source], on_bad_row="skip", bad_rows=kept)
    assert [row.origin.row for row in reading.rows] == [1, 4]
    assert reading.reports[0].skipped == 2
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [(line["file"], line["row"], line["key"]) for line in lines] == [
        (source.path, 2, "messages[1].content"),
        (source.path, 3, ""),
    ]
    assert json.loads(lines[0]["raw"]) == BAD
    assert lines[1]["raw"] == '{"messages": ['
    assert "not valid JSON" in lines[1]["problem"]


def test_no_file_of_bad_rows_without_bad_rows(tmp_path: Path) -> None:
    read([write(tmp_path / "a.jsonl", [GOOD])], on_bad_row="skip", bad_rows=tmp_path / "bad.jsonl")
    assert not (tmp_path / "bad.jsonl").exists()


def test_a_source_without_a_good_row_stops_even_when_skipping(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.jsonl", [GOOD]), write(tmp_path / "b.jsonl", [BAD, BAD])
    with pytest.raises(DataError, match="None of its 2 rows") as caught:
        read([good, bad], on_bad_row="skip")
    assert caught.value.where == f"{bad.path}:1"
    with pytest.raises(DataError, match="no rows"):
        read([write(tmp_path / "c.jsonl", [])])
    assert gather([good, bad]).reports[1].rows == 0


def test_good_rows_after_many_that_cannot_be_parsed_are_recognised(tmp_path: Path) -> None:
    reading = gather([write(tmp_path / "a.jsonl", ["{"] * 30 + [GOOD])])
    assert len(reading.bad) == 30
    assert reading.rows[0].messages[1]["content"] == "答"


def test_max_examples_counts_good_rows_of_each_source(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{name}.jsonl", [GOOD, BAD, GOOD, GOOD]) for name in "ab"]
    reading = read(sources, on_bad_row="skip", max_examples=2)
    assert reading.source_index == [0, 0, 1, 1]
    assert [report.skipped for report in reading.reports] == [1, 1]


def test_system_message_goes_where_there_is_none(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "自前"}, *GOOD["messages"]]}
    sources = [write(tmp_path / "a.jsonl", [GOOD, own]), write(tmp_path / "b.jsonl", [{"text": "文"}])]
    rows = read(sources, system="共通").rows
    assert [row.messages[0]["content"] for row in rows[:2]] == ["共通", "自前"]
    assert rows[2].messages == ()
    assert rows[2].text == "文"


def test_kind_in_the_recipe_comes_before_what_the_rows_look_like(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "text": "全文"}]).path
    reading = read([SourceSection(path=path, kind="text")])
    assert reading.rows[0].text == "全文"
    assert "recipe" in reading.reports[0].recognised


def test_columns_rename_and_their_slips_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "問", "answer": "答"}]).path
    rows = read([SourceSection(path=path, columns={"instruction": "question", "output": "answer"})]).rows
    assert [message["content"] for message in rows[0].messages] == ["問", "答"]
    with pytest.raises(DataError, match="Did you mean `answer`"):
        read([SourceSection(path=path, columns={"instruction": "question", "output": "anser"})])
    with pytest.raises(DataError, match="Did you mean `output`"):
        read([SourceSection(path=path, columns={"outputs": "answer"})])


def test_unrecognised_rows_stop_with_their_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": "問", "answer": "答"}])
    with pytest.raises(DataError, match="question, answer") as caught:
        read([source], on_bad_row="skip")
    assert "columns: {prompt: question, completion: answer}" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_a_bad_row_and_can_be_written_out(tmp_path: Path, name: str) -> None:
    half = {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "答"}]}
    path = tmp_path / name
    lines = [json.dumps(GOOD), json.dumps(half)]
    path.write_text("[" + ",".join(lines) + "]" if name.endswith(".json") else "\n".join(lines))
    reading = read([SourceSection(path=str(path))], on_bad_row="skip", bad_rows=tmp_path / "bad.jsonl")
    assert [bad.key for bad in reading.bad] == ["messages[0].content"]
    raw = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))["raw"]
    assert (json.loads(raw) if isinstance(raw, str) else raw) == half
