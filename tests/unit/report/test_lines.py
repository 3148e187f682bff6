"""Lines of the plain view: what a person needs of an event, no more."""

from kitaeru.events import DataReady, Preflight, SteppedDown
from kitaeru.report.history import History
from kitaeru.report.lines import event_line


def line(kinds):
    event = DataReady(split="train", examples=2, tokens=20, trained_tokens=10, longest=12, kinds=kinds)
    return event_line(event).plain


def test_sources_are_named_by_their_files_unless_two_share_a_name():
    assert "a.jsonl: messages, b.txt: text" in line({"/data/a.jsonl": "messages", "/data/b.txt": "text"})
    assert "/data" not in line({"/data/a.jsonl": "messages"})
    both = line({"/one/a.jsonl": "messages", "/two/a.jsonl": "alpaca"})
    assert "/one/a.jsonl: messages" in both
    assert "/two/a.jsonl: alpaca" in both


def stepped(tokens, activations="keep"):
    planned = {"planned_micro_batch_tokens": 4096, "planned_activations": "keep"}
    return SteppedDown(step=7, micro_batch_tokens=tokens, activations=activations, **planned)


def test_running_out_of_memory_says_how_it_goes_on():
    assert "micro-batches of 2,048 tokens instead of 4,096" in event_line(stepped(2048)).plain
    both = event_line(stepped(512, "recompute")).plain
    assert both.startswith("warning: Memory ran out")
    assert "512 tokens instead of 4,096, activations computed again" in both
    assert "instead" not in event_line(stepped(4096, "recompute")).plain
    past = History((stepped(2048), stepped(2048), stepped(1024)))
    assert [(notice.level, notice.step) for notice in past.notices] == [("warning", 7)] * 2


def test_what_was_tried_before_training():
    tried = Preflight(tokens=4096, peak_bytes=17_000_000_000, planned_bytes=16_500_000_000, seconds=1.0)
    assert "(4,096 tokens) was tried first: 17.0 GB, planned 16.5 GB." in event_line(tried).plain
    assert History((tried,)).preflight is tried
