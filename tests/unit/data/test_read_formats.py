"""Files of every format give the same rows, at exact places, or an error that says what to do."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.data.read import Reading, gather, read
from kitaeru.data.sources import parts_of
from kitaeru.errors import DataError
from kitaeru.recipe.types import SourceSection

ROWS = [
    {"instruction": "日本の首都は?", "input": "", "output": "東京です。"},
    {"instruction": '"引用"と,コンマ', "input": "二行の\n文脈", "output": "はい。\nそうです。"},
]


def source(path: Path, **more: object) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), **more})


def conversation(reading: Reading) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in row.messages] for row in reading.rows]


EXPECTED = [
    [("user", "日本の首都は?"), ("assistant", "東京です。")],
    [("user", '"引用"と,コンマ\n\n二行の\n文脈'), ("assistant", "はい。\nそうです。")],
]


def content_of(suffix: str) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if suffix in (".jsonl", ".ndjson"):
        return ("\n".join(lines) + "\n").encode()
    if suffix == ".json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        return sink.getvalue()
    delimiter = "," if suffix == ".csv" else "\t"
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
    return ("\r\n".join(quoted) + "\r\n").encode()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    squeeze = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    file = tmp_path / f"rows{suffix}{compression}"
    file.write_bytes(squeeze(content_of(suffix)))
    reading = read([source(file)])
    assert conversation(reading) == EXPECTED
    assert reading.reports[0].kind == "alpaca"
    assert reading.reports[0].files == (str(file),)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".txt"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, suffix: str) -> None:
    content = "日本語です".encode() if suffix == ".txt" else content_of(suffix)
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + content)
    rows = read([source(file)]).rows
    assert rows[0].text == "日本語です" if suffix == ".txt" else rows[0].messages[0]["content"] == "日本の首都は?"


def test_json_object_with_data_and_json_lines_named_json(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole.json", tmp_path / "lines.json"
    whole.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    lines.write_bytes(content_of(".jsonl"))
    assert conversation(read([source(whole)])) == conversation(read([source(lines)])) == EXPECTED


def test_json_array_named_jsonl_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content_of(".json"))
    with pytest.raises(DataError, match=r"one JSON array") as caught:
        read([source(file)])
    assert ".json" in (caught.value.remedy or "")


def test_json_object_without_rows_names_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"vocab": [1, 2], "version": "1.0"}')
    with pytest.raises(DataError, match="vocab, version"):
        read([source(file)])


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[\n{"text": "a"},\n{"text": oops}\n]')
    with pytest.raises(DataError) as caught:
        read([source(file)])
    assert caught.value.where == f"{file}:3"


def test_txt_documents_are_set_apart_by_two_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_bytes("\n\n\n　一の一\r\n\n一の二\n \n\n\n二\n".encode())
    rows = read([source(file)]).rows
    assert [row.text for row in rows] == ["　一の一\n\n一の二", "二"]
    assert [row.origin.row for row in rows] == [4, 10]


def test_txt_without_gaps_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_text("一\n\n二\n三\n", encoding="utf-8")
    assert [row.text for row in read([source(file)]).rows] == ["一\n\n二\n三"]


def test_csv_names_the_line_where_a_record_begins(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('instruction,output\n"二\n行",x\n\nc,\n"e\nf",y\nh\nz,"k"k\nl,m\n', encoding="utf-8")
    reading = gather([source(file)])
    assert [row.origin.row for row in reading.rows] == [2, 6, 10]
    assert [(bad.origin.row, bad.key) for bad in reading.bad] == [(5, "output"), (8, ""), (9, "")]
    assert "1 cells, the header 2" in reading.bad[1].problem


def test_csv_quote_that_never_closes_is_told_at_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('instruction,output\na,b\nc,"d\ne,f\n', encoding="utf-8")
    with pytest.raises(DataError, match="not valid CSV") as caught:
        read([source(file)])
    assert caught.value.where == f"{file}:3"


def test_csv_documents_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "長" * 200_000 + "\n", encoding="utf-8")
    assert len(read([source(file)]).rows[0].text or "") == 200_000


def test_jsonl_lines_are_not_cut_at_unicode_separators(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "前\u2028後\x85末"}\n\n{"text": "次"}\n', encoding="utf-8")
    assert [(row.text, row.origin.row) for row in read([source(file)]).rows] == [("前\u2028後\x85末", 1), ("次", 3)]


def test_nested_parquet_columns_lose_their_foreign_nulls(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "東京"}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "晴れ?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
        {"messages": [{"role": "user", "content": "やあ"}, {"role": "assistant", "content": "どうも"}]},
    ]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    first, second = read([source(file)]).rows
    assert first.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "東京"}}
    assert second.messages == ({"role": "user", "content": "やあ"}, {"role": "assistant", "content": "どうも"})


@pytest.mark.parametrize(
    ("codec", "named"), [("cp932", "CP932"), ("euc_jp", "EUC-JP"), ("iso2022_jp", "ISO-2022-JP"), ("utf-16", "UTF-16")]
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt", ".json", ".jsonl.gz"])
def test_other_encodings_are_named_with_the_command(tmp_path: Path, codec: str, named: str, suffix: str) -> None:
    text = "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"
    body = {
        ".csv": f"text\n{text}\n",
        ".txt": f"{text}\n",
        ".json": json.dumps([{"text": text}], ensure_ascii=False),
    }.get(suffix, json.dumps({"text": text}, ensure_ascii=False) + "\n")
    content = body.encode(codec)
    file = tmp_path / f"neko{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(DataError) as caught:
        read([source(file)], on_bad_row="skip")
    assert named in caught.value.what
    remedy = caught.value.remedy or ""
    assert f"iconv -f {named} -t UTF-8" in remedy
    assert (f"zcat {file}" in remedy) == suffix.endswith(".gz")


def test_a_damaged_byte_is_one_bad_row_not_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "吾輩は猫である。"}, ensure_ascii=False).encode()
    file.write_bytes(good + b"\n" + good.replace("猫".encode(), b"\xe7\x8c") + b"\n" + good + b"\n")
    reading = gather([source(file)])
    assert len(reading.rows) == 2
    assert [bad.origin.row for bad in reading.bad] == [2]
    assert "damaged" in reading.bad[0].problem


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(json.dumps({"text": f"{number:x}" * 9}).encode() + b"\n" for number in range(20_000))
    if suffix == ".parquet":
        whole = content_of(".parquet")
    else:
        whole = gzip.compress(lines) if suffix.endswith(".gz") else zstandard.compress(lines)
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError) as caught:
        read([source(file)])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["model.pkl", "weights.pt", "pytorch_model.bin", "rows.pickle.gz"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match="Pickled files are refused"):
        read([source(tmp_path / name)])


def test_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.jsonl"):
        read([source(tmp_path / "rows.xlsx")])


def test_folder_is_read_sorted_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.txt", "b/1.txt", ".hidden/x.txt", "b/.y.txt", "README.md", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        body = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]})
        (tmp_path / name).write_text(body if name.endswith(".jsonl") else name, encoding="utf-8")
    reading = read([source(tmp_path)])
    assert [row.text or row.messages[1]["content"] for row in reading.rows] == ["a.txt", "b/1.txt", "b/2.jsonl"]
    assert reading.reports[0].kind == "text, messages"
    assert reading.reports[0].rows == 3


def test_folder_without_readable_files(tmp_path: Path) -> None:
    (tmp_path / "data-00000.arrow").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="to_parquet"):
        read([source(tmp_path)])


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError) as caught:
        read([source(tmp_path / "trian.jsonl")])
    assert caught.value.remedy == f"Did you mean {tmp_path / 'train.jsonl'}?"
    with pytest.raises(DataError, match=r"In that folder are: train\.jsonl"):
        read([source(tmp_path / "zzz.csv")])


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parts_of(SourceSection(path="owner/name"))[0].hub is not None
    assert parts_of(SourceSection(path="squad_ja"))[0].hub is not None
    for path in ("owner/name.jsonl", "./name", "a/b/c", "name.pkl", "name.gz"):
        with pytest.raises(DataError, match="no such file"):
            parts_of(SourceSection(path=path))
    (tmp_path / "instructions").mkdir()
    with pytest.raises(DataError, match="Did you mean instructions"):
        parts_of(SourceSection(path="instruction"))


def test_hub_offline_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Hub cannot be reached") as caught:
        read([SourceSection(path="kitaeru-nobody/no-such-data-set")])
    assert caught.value.where == "kitaeru-nobody/no-such-data-set"


# Anything a person can write in UTF-8; NUL is not text, and a row of nothing but spaces is a bad one.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip)


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_text_comes_back_exactly_from_every_table(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "a.jsonl").write_bytes(lines.encode())
    (folder / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "c.parquet")
    with (folder / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["text"], *([text] for text in texts)])
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv"):
        assert [row.text for row in read([source(folder / name)]).rows] == texts, name
