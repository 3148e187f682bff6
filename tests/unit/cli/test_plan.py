"""`kitaeru plan` and `kitaeru models`: fast, without torch, in 80 columns, and as a program reads them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kitaeru import i18n
from kitaeru.cli import main
from kitaeru.hardware import parse_gpus
from kitaeru.recipe.read import read

ELYZA = "elyza/Llama-3-ELYZA-JP-8B"
PAIR = ("--gpus", "2x RTX A5000", "--ram", "128GB")
KEYS = {"name", "strategy", "method", "fits", "peak_bytes", "memory", "host_bytes", "step_seconds", "tokens_per_second",
        "trained_parameters", "micro_batch_tokens", "global_batch_tokens", "why"}  # fmt: skip


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, "plan", *words, "--json"))
    return found


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("words", [[ELYZA, *PAIR], [ELYZA, "--gpus", "8x H100"], ["bundled"]], ids=["2", "8", "here"])
def test_in_under_a_second_without_torch(
    words: list[str], times_its_libraries: Callable[[list[str], float], float]
) -> None:
    """A second where the libraries of any such program take a fifth of one, as on the machine it was written on."""
    assert times_its_libraries(["plan", *words], 5.0) < 5.0


def test_json_is_what_the_design_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, ELYZA, *PAIR)
    assert found["model"] == ELYZA
    assert len(found["hardware"]["devices"]) == 2
    chosen = found["candidates"][found["chosen"]]
    assert chosen["fits"]
    assert chosen["built"]
    for candidate in found["candidates"]:
        assert set(candidate) >= KEYS
        assert sum(candidate["memory"].values()) == max(candidate["peak_bytes"])
        assert len(candidate["peak_bytes"]) in (1, 2)
        assert candidate["step_seconds"] * candidate["tokens_per_second"] == pytest.approx(
            candidate["global_batch_tokens"]
        )
        assert candidate["why"]
        if not candidate["fits"]:
            assert re.search(r"needs [0-9.]+ GB", " ".join(candidate["why"]))
    assert all(way["why"] for way in found["impossible"])


PAGES = [
    [ELYZA, *PAIR],
    ["mistralai/Mixtral-8x7B-v0.1", *PAIR],
    ["meta-llama/Llama-2-7b-hf", *PAIR[:3], "256GB", "--set", "method=full"],
    [ELYZA, "--gpus", "8x H100, nvlink", "--ram", "1TB"],
    [ELYZA, *PAIR, "--explain", "pipeline-1f1b"],
    [ELYZA, *PAIR, "--explain", "zero3"],
    [ELYZA, *PAIR, "--what-if", "add 1 GPU", "--what-if", "nvlink"],
    ["bundled", "--gpus", "none"],
]


class Kana:
    """A catalogue that knows every text, in letters two columns wide."""

    def gettext(self, message: str) -> str:
        return re.sub(r"(\{[^}]*\}|`[^`]*`)|[A-Za-z]+", lambda m: m[1] or "あ" * (len(m[0]) // 2 + 1), message)


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
@pytest.mark.parametrize("wide", [False, True], ids=["latin", "kana"])
def test_every_page_is_at_most_80_columns(
    words: list[str], wide: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(i18n, "_catalogue", lambda code: Kana())
    out = printed(capsys, "plan", *words)
    assert max(width(line.rstrip()) for line in out.splitlines()) <= 80
    if wide:
        assert not re.search(r"\b(?:the|of|is|not|takes|would|built)\b", out)


def test_the_page_says_what_a_person_asks(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "plan", ELYZA, *PAIR)
    rows = [line for line in out.splitlines() if re.match(r"\S+/(?:q?lora|full)\S*/", line)]
    assert sum("chosen" in row for row in rows) == 1
    assert "chosen" in rows[0]
    assert all(re.search(r"[0-9.]+ GB +[0-9,]+–[0-9,]+ ", row) for row in rows)
    bar = next(line for line in out.splitlines() if "WWW" in line)
    assert len(re.search(r"[WTAhm.]{20,}", bar)[0]) == 40  # type: ignore[index]
    assert "tokens/s" in out
    assert "not measured" in out


def test_explain_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, ELYZA, *PAIR)
    chosen = found["candidates"][found["chosen"]]
    out = printed(capsys, "plan", ELYZA, *PAIR, "--explain", chosen["name"])
    for name in (*chosen["memory"], *chosen["host"], *chosen["seconds"]):
        assert name in out
    assert "steady step" in out
    out = printed(capsys, "plan", ELYZA, *PAIR, "--explain", "ddq/lora/keep/2048", code=2)
    assert "Did you mean" in out


def test_what_if(capsys: pytest.CaptureFixture[str]) -> None:
    more = plan(capsys, ELYZA, "--gpus", "RTX A5000", "--what-if", "add 1 GPU")
    assert len(more["hardware"]["devices"]) == 2
    out = printed(capsys, "plan", ELYZA, "--gpus", "RTX A5000", "--what-if", "add 1 GPU")
    assert "What if: add 1 GPU" in out
    longer = plan(capsys, ELYZA, *PAIR, "--what-if", "seq-len=8192")
    assert all(c["micro_batch_tokens"] >= 8192 for c in longer["candidates"])
    smaller = ("meta-llama/Llama-2-7b-hf", *PAIR[:3], "192GB", "--set", "method=full")
    roomy = plan(capsys, *smaller, "--what-if", "ram=256GB")
    assert "zero3-offload-all" in {c["name"].split("/")[0] for c in roomy["candidates"] if c["fits"]}
    assert "not a change" in printed(capsys, "plan", ELYZA, *PAIR, "--what-if", "luck", code=2)


def test_a_recipe_goes_in_and_one_comes_out(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    Path("r.yaml").write_text(f"model: {ELYZA}\ndata: {{train: a.jsonl, seq_len: 1024}}\nmethod: qlora\n")
    found = plan(capsys, "r.yaml", *PAIR)
    assert {c["method"] for c in found["candidates"]} == {"qlora"}
    printed(capsys, "plan", "r.yaml", *PAIR, "-o", "made.yaml")
    made = read(Path("made.yaml")).recipe
    chosen = found["candidates"][found["chosen"]]
    assert made.strategy == chosen["strategy"]
    assert made.limits.micro_batch_tokens == chosen["micro_batch_tokens"]
    assert made.data.seq_len == 1024


def test_data_brings_its_lengths(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    Path("short.jsonl").write_text("".join(json.dumps({"text": "鍛える" * 20}) + "\n" for _ in range(50)))
    without, short = plan(capsys, ELYZA, *PAIR), plan(capsys, ELYZA, *PAIR, "--data", "short.jsonl")
    assert min(c["micro_batch_tokens"] for c in short["candidates"]) < 256
    assert short["candidates"][0]["global_batch_tokens"] < without["candidates"][0]["global_batch_tokens"]


def test_a_machine_from_a_file(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    machine = parse_gpus("2x RTX A5000", "128GB")
    Path("m.json").write_text(json.dumps(machine.to_dict()))
    from_file, in_words = plan(capsys, ELYZA, "--gpus", "m.json"), plan(capsys, ELYZA, *PAIR)
    assert from_file["candidates"] == in_words["candidates"]
    Path("d.json").write_text(json.dumps({"hardware": machine.to_dict()}))
    assert plan(capsys, ELYZA, "--gpus", "d.json")["candidates"] == in_words["candidates"]


def test_what_nobody_trains_is_one_sentence_of_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "plan", "meta-llama/Llama-3.1-405B", *PAIR, code=1)
    assert "4.2 times what is free on all 2 devices together" in out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["nobody/Llama-9-8B"], "Llama-3-ELYZA-JP-8B"),
        ([ELYZA, "--gpus", "2x RTX 5"], "not in kitaeru's table"),
        ([ELYZA, "--gpus", "no.json"], "cannot be read"),
    ],
)
def test_mistakes(words: list[str], answer: str, capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    assert main(["plan", *words]) in (1, 2)
    assert answer in capsys.readouterr().err


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "models", *PAIR, "--json"))["models"]
    by_name = {row["model"]: row for row in found}
    assert not by_name["meta-llama/Llama-3.1-405B"]["fits"]
    elyza = by_name[ELYZA]
    assert elyza["hours_per_million_tokens"] == pytest.approx(1e6 / elyza["tokens_per_second"] / 3600)
    assert elyza["method"] == "lora"
    out = printed(capsys, "models", *PAIR)
    assert max(width(line.rstrip()) for line in out.splitlines()) <= 80
    assert all(name.rpartition("/")[2][:12] in out for name in by_name)
