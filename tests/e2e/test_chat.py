"""Talking to a run: one voice and two, history, commands, a model that is no run."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from kitaeru.cli.chat import _answer
from kitaeru.errors import ModelError
from kitaeru.export.chat import open_chat


@pytest.fixture(scope="module")
def run(tiny_model, chat_data, tmp_path_factory):
    """A finished LoRA run that has clearly moved away from its base."""
    from kitaeru.engine import run as engine
    from kitaeru.recipe.read import read

    folder = tmp_path_factory.mktemp("chat") / "run"
    recipe = read(
        None,
        values={
            "model": str(tiny_model), "data.train": str(chat_data), "output": str(folder), "method": "lora",
            "train.max_steps": 6, "train.learning_rate": 0.05, "train.global_batch_tokens": 512, "samples.count": 0,
            "data.seq_len": 64, "track.tensorboard": False,
        },
    ).recipe  # fmt: skip
    engine.train(engine.prepare(recipe), [])
    return folder


@pytest.fixture(scope="module")
def chat(run):
    opened = open_chat(str(run), compare=True)
    opened.sampling = type(opened.sampling)(max_new_tokens=5)
    return opened


def test_base_and_tuned_answer_differently_and_the_base_is_the_base(chat, tiny_model):
    base, tuned = chat.voices
    said = ["".join(chat.say(voice, "日本の首都は?")) for voice in (base, tuned)]
    assert said[0] != said[1]
    alone = open_chat(str(tiny_model))
    alone.sampling = chat.sampling
    assert "".join(alone.say(alone.voices[0], "日本の首都は?")) == said[0]


def test_each_voice_keeps_its_own_history_and_reset_forgets(chat):
    chat.reset()
    tuned = chat.voices[1]
    first = "".join(chat.say(tuned, "こんにちは"))
    assert [m["role"] for m in chat.histories[tuned.name]] == ["user", "assistant"]
    assert chat.histories[tuned.name][1]["content"] == first.strip()
    assert chat.voices[0].name not in chat.histories
    "".join(chat.say(tuned, "もう一度"))
    assert len(chat.histories[tuned.name]) == 4
    chat.reset()
    assert chat.histories == {}


def test_pieces_arrive_before_the_answer_is_complete(chat):
    chat.reset()
    pieces = list(chat.say(chat.voices[1], "色々話してください"))
    assert len([p for p in pieces if p]) >= 2


def test_a_fault_while_answering_reaches_the_caller_and_leaves_no_history(chat):
    chat.reset()
    chat.system = "x"
    broken = chat.tokenizer.chat_template
    chat.tokenizer.chat_template = "{{ raise_exception('no') }}"
    try:
        with pytest.raises(Exception, match="no"):
            "".join(chat.say(chat.voices[1], "?"))
    finally:
        chat.tokenizer.chat_template = broken
        chat.system = None
    assert not chat.histories[chat.voices[1].name]


def test_two_columns_fit_a_terminal_of_80(chat):
    chat.reset()
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    _answer(out, chat, "右と左")
    text = out.file.getvalue()
    assert "base" in text
    assert "tuned" in text


def test_comparing_needs_a_run_and_a_run_needs_a_result(tiny_model, run, tmp_path):
    with pytest.raises(ModelError, match="not a run folder"):
        open_chat(str(tiny_model), compare=True)
    (tmp_path / "plan.json").write_bytes((run / "plan.json").read_bytes())
    with pytest.raises(ModelError, match="no finished result"):
        open_chat(str(tmp_path))


def test_the_command_line_answers_what_is_typed(run):
    done = subprocess.run(
        [sys.executable, "-m", "kitaeru", "chat", str(run), "--max-new-tokens", "3"],
        input="/system 短く答えて\nこんにちは\n/what\n/reset\n/quit\n", text=True, capture_output=True, check=False,
        env={**os.environ, "COLUMNS": "80"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "System message: 短く答えて" in done.stdout
    assert "Known commands" in done.stdout
    assert "Forgotten." in done.stdout
    assert "Traceback" not in done.stderr
