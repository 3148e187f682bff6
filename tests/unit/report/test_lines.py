"""Lines of the plain view: what a person needs of an event, no more."""

from kitaeru.events import DataReady
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
