"""Kana arrive as they are written, half a character never does, and the pieces make the whole text."""

import threading

import pytest
import torch
from transformers import AutoTokenizer

from kitaeru.export.stream import TextPieces


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def pieces_of(tokenizer, text):
    stream = TextPieces(tokenizer)
    stream.put(torch.tensor([[1, 5, 6]]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def feed():
        for token in ids:
            stream.put(torch.tensor([token]))
        stream.put(torch.tensor([tokenizer.eos_token_id]))
        stream.end()

    thread = threading.Thread(target=feed)
    thread.start()
    pieces = list(stream)
    thread.join()
    return pieces, ids


@pytest.mark.parametrize(
    "text", ["ひらがなだけのぶんしょうです", "漢字とカナ、混ぜて。", "plain words", "絵文字🍣と𠮷野家"]
)
def test_the_pieces_make_the_text_and_no_character_is_halved(tokenizer, text):
    pieces, _ = pieces_of(tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_kana_are_not_held_back(tokenizer):
    pieces, ids = pieces_of(tokenizer, "ひらがなだけのぶんしょうです")
    assert len(pieces) == len(ids) > 3
