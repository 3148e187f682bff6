"""What `kitaeru data check` says of data: masks, lengths, and what is odd about the text."""

from __future__ import annotations

import io
import itertools
import json
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from kitaeru.cli.data import check as command
from kitaeru.cli.data import print_check
from kitaeru.data.check import Check, check, measure, show
from kitaeru.data.findings import duplicate_findings, text_findings
from kitaeru.data.read import gather
from kitaeru.data.tokenise import tokenise
from kitaeru.data.types import Example, Origin, Row
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.recipe.types import ModelSection, SourceSection

SENTENCES = (
    "吾輩は猫である。名前はまだ無い。",
    "どこで生れたかとんと見当がつかぬ。",
    "山路を登りながら、こう考えた。",
    "メロスは激怒した。必ず、かの邪智暴虐の王を除かなければならぬと決意した。",
    "コンピュータのデータをコピーしてください。",
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(ModelSection(name=str(tokenizer_folder)))


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def checked(folder: Path, tokenizer: Any, rows: list[Any], **options: Any) -> Check:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    reading = gather([SourceSection(path=str(file))])
    train_on = options.get("train_on", "assistant")
    return check(reading, tokenise(reading.rows, tokenizer, train_on=train_on), tokenizer, **options)


def names(found: Check) -> dict[str, int]:
    return {finding.name: finding.rows for finding in found.findings}


def text_names(*texts: str) -> set[str]:
    rows = [Row(Origin("f", index), text=text) for index, text in enumerate(texts, 1)]
    return {finding.name for finding in text_findings(rows)}


def test_shown_rows_are_the_whole_text_with_the_answers_marked(tmp_path: Path, tokenizer: Any) -> None:
    found = checked(tmp_path, tokenizer, [talk("一番は？", "富士山です。"), talk("二番は？", "北岳です。")], shown=1)
    (shown,) = found.examples
    assert [text for text, trained in shown.segments if trained] == ["富士山です。</s>"]
    whole = "".join(text for text, _ in shown.segments)
    assert whole.startswith("<s>")
    assert "一番は？" in whole
    assert shown.tokens == len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert 0 < shown.trained_tokens < shown.tokens
    assert found.ok
    assert names(found) == {}


@given(mask=st.lists(st.booleans(), min_size=1, max_size=12), text=st.sampled_from(SENTENCES))
def test_segments_always_join_to_the_text(tokenizer: Any, mask: list[bool], text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    trained = [mask[index % len(mask)] for index in range(len(ids))]
    shown = show(Example(Origin("f", 1), ids, trained), tokenizer)
    assert "".join(segment for segment, _ in shown.segments) == "<s>" + text
    flags = [flag for _, flag in shown.segments]
    assert all(a != b for a, b in itertools.pairwise(flags))


def test_numbers_add_up(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": sentence} for sentence in SENTENCES]
    found = checked(tmp_path, tokenizer, rows)
    lengths = [len(tokenizer(sentence)["input_ids"]) + 1 for sentence in SENTENCES]  # BOS from the tokenizer, EOS
    assert found.tokens == sum(lengths)
    assert found.trained_tokens == found.tokens - len(SENTENCES)
    assert found.characters == sum(map(len, SENTENCES))
    assert found.characters_per_token == pytest.approx(found.characters / found.tokens)
    assert found.lengths is not None
    assert (found.lengths.shortest, found.lengths.longest) == (min(lengths), max(lengths))
    assert found.fallback_share == 0
    assert json.loads(json.dumps(asdict(found)))["sources"][0]["kind"] == "text"


def test_measure_is_the_nearest_rank() -> None:
    lengths = measure(range(1, 201))
    assert lengths is not None
    assert (lengths.shortest, lengths.median, lengths.p90, lengths.p99, lengths.longest) == (1, 100, 180, 198, 200)
    assert lengths.histogram == ((0, 32, 32), (33, 64, 32), (65, 128, 64), (129, 256, 72))
    assert measure([]) is None


@given(st.lists(st.integers(1, 100_000), min_size=1))
def test_histogram_holds_every_example(values: list[int]) -> None:
    lengths = measure(values)
    assert lengths is not None
    for first, last, count in lengths.histogram:
        assert count == sum(first <= value <= last for value in values)
    assert sum(count for _, _, count in lengths.histogram) == len(values)


def test_masks_that_would_stop_a_run_are_errors(tmp_path: Path, tokenizer: Any) -> None:
    silent = {"messages": [*talk("問", "答")["messages"]]}
    silent["messages"][1] = silent["messages"][1] | {"weight": 0}
    found = checked(tmp_path, tokenizer, [talk("問", "別の答"), silent])
    assert names(found)["mask_0"] == 1
    assert found.findings[0].places[0].endswith("rows.jsonl:2")
    assert not found.ok


def test_a_template_that_marks_everything_is_an_error_unless_all_is_meant(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    template = tmp_path / "answers.jinja"
    template.write_text("{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endfor %}")
    bare = load_tokenizer(ModelSection(name=str(tokenizer_folder), chat_template=str(template)))
    only_answers = {"messages": [{"role": "assistant", "content": "独り言です。"}]}
    found = checked(tmp_path, bare, [only_answers])
    assert names(found) == {"mask_100": 1}
    assert not found.ok
    assert checked(tmp_path, bare, [only_answers], train_on="all").ok


def test_raw_text_may_be_trained_whole(tmp_path: Path, tokenizer: Any) -> None:
    assert checked(tmp_path, tokenizer, [{"text": SENTENCES[0]}]).ok


def test_rows_the_template_refuses_are_errors(tmp_path: Path, tokenizer: Any) -> None:
    row = talk("問", "答")
    row["messages"].insert(1, {"role": "tool", "content": "結果"})
    found = checked(tmp_path, tokenizer, [talk("問", "答え"), row])
    assert names(found) == {"refused_by_template": 1}
    assert found.findings[0].places[0].endswith("rows.jsonl:2")
    assert len(found.examples) == 1
    assert not found.ok


def test_seq_len_tells_long_rows_and_answers_cut_off(tmp_path: Path, tokenizer: Any) -> None:
    rows = [talk("短い", "はい"), talk("長い" + SENTENCES[3] * 20, "はい。"), talk("短い問", SENTENCES[3] * 20)]
    found = checked(tmp_path, tokenizer, rows, seq_len=100)
    assert names(found) == {"answer_cut_off": 1, "long": 2}
    assert found.findings[0].places[0].endswith("rows.jsonl:2")
    assert found.ok


def test_byte_fallback_of_a_sentencepiece_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    found = checked(tmp_path, tokenizer, [{"text": "𓀀𓀁𓀂𓀃"}])
    assert found.tokens == 16 + 2  # four bytes each, BOS and EOS
    assert found.fallback_share == pytest.approx(16 / 18)
    assert "byte_fallback" in names(found)


def test_pieces_of_characters_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    byte_level = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = checked(tmp_path, byte_level, [{"text": "abcdef猫"}])
    assert found.tokens == 9
    assert found.fallback_share == pytest.approx(3 / 9)


@pytest.mark.parametrize("codec", ["cp932", "latin-1", "cp1252"])
@pytest.mark.parametrize("text", SENTENCES)
def test_utf8_read_in_another_encoding_is_mojibake(codec: str, text: str) -> None:
    assert "mojibake" in text_names(text.encode().decode(codec, "replace"))


@pytest.mark.parametrize("codec", ["cp932", "euc_jp"])
@pytest.mark.parametrize("text", SENTENCES)
def test_japanese_encodings_read_as_latin1_are_mojibake(codec: str, text: str) -> None:
    assert "mojibake" in text_names(text.encode(codec).decode("latin-1"))


@pytest.mark.parametrize(
    "text", [*SENTENCES, "よなよなと縺れつ縺れつゆらめき出た", "繧繝縁", "déjà vu, naïve façade « été »", "￥100"]
)
def test_good_text_is_not_mojibake(text: str) -> None:
    assert "mojibake" not in text_names(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("失われた\ufffd字", "replacement_character"),
        ("見え\u200bない", "control_character"),
        ("赤\x1b[31m", "control_character"),
        (unicodedata.normalize("NFD", "がぎぐげご"), "loose_dakuten"),
        ("\ufa19社", "not_nfc"),
        ("ｶﾀｶﾅ", "half_width_katakana"),
        ("ＡＢＣ", "full_width_ascii"),
        ("１２３", "full_width_ascii"),
        ("①番の㈱", "compatibility_character"),
    ],
)
def test_each_oddity_has_its_own_name(text: str, name: str) -> None:
    assert text_names(text) == {name}
    assert text_names("普通の文。", f"前後に{text}ある") == {name}


def test_ordinary_text_has_no_findings() -> None:
    assert (
        text_names(
            "「はい」！？（笑）…　全角の空白と\tタブ\n改行、~は普通。", "plain ASCII\n", "👩‍👩‍👧 café", *SENTENCES
        )
        == set()
    )


def test_findings_name_the_first_places_and_all_rows() -> None:
    rows = [Row(Origin("f", number), text=f"ｱ{number}") for number in range(1, 9)]
    (finding,) = text_findings(rows)
    assert (finding.rows, finding.places) == (8, ("f:1", "f:2", "f:3"))
    assert "ｱ1" in finding.sample


def made(number: int, question: str, answer: str) -> Row:
    return Row(Origin("f", number), messages=tuple(talk(question, answer)["messages"]))


def test_duplicates_and_questions_with_two_answers() -> None:
    rows = [
        made(1, "ＡＩとは？", "甲"),
        made(2, "別の問", "乙"),
        made(3, "ＡＩとは？", "甲"),
        made(4, "AI とは?", "丙"),
    ]
    same, answers = duplicate_findings(rows)
    assert (same.name, same.rows, same.places) == ("duplicate", 1, ("f:3 = f:1",))
    assert (answers.name, answers.rows, answers.places) == ("same_question", 1, ("f:4 ≈ f:1",))
    assert duplicate_findings(rows[:2]) == []


def printed(found: Check, **options: Any) -> str:
    sink = io.StringIO()
    print_check(Console(file=sink, width=80, highlight=False, markup=False, **options), found)
    return sink.getvalue()


def everything_odd(folder: Path, tokenizer: Any) -> Check:
    rows = [
        talk(SENTENCES[3] * 12, "[bold]括弧[/bold]\x1b[31m"),
        talk("ｶﾀｶﾅ", "①" + SENTENCES[0].encode().decode("cp932", "replace")),
        {"messages": [{"role": "user", "content": "答えのない問い" * 10}]},
    ]
    return checked(folder, tokenizer, rows, seq_len=100)


def test_page_fits_80_columns_and_marks_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    page = printed(everything_odd(tmp_path, tokenizer))
    assert max(cell_len(line) for line in page.splitlines()) <= 80
    assert "⟦[bold]括弧[/bold][31m</s>⟧" in page
    assert "\x1b" not in page
    assert "no assistant turn" in page
    assert "A run would stop" in page


def test_page_is_coloured_on_a_terminal(tmp_path: Path, tokenizer: Any) -> None:
    found = checked(tmp_path, tokenizer, [talk("一番は？", "富士山です。")])
    page = printed(found, force_terminal=True, color_system="standard", legacy_windows=False)
    assert "\x1b[32m富士山です。</s>\x1b[0m" in page
    assert "⟦" not in page
    assert "⟦富士山です。</s>⟧" in printed(found, force_terminal=True, no_color=True)


def test_command_prints_json_and_returns_the_exit_code(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(talk("問", "答え")) + "\n")
    assert command([str(file)], model=str(tokenizer_folder), json_=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert answer["rows"] == 1
    assert answer["examples"][0]["segments"][-1] == ["答え</s>", True]
    file.write_text(json.dumps(talk("問", "")) + "\n")
    assert command([str(file)], model=str(tokenizer_folder)) == 1
    assert "`messages[1].content`" in capsys.readouterr().out
