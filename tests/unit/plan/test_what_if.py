from __future__ import annotations

import pytest

from kitaeru.errors import UsageError
from kitaeru.hardware import parse_gpus
from kitaeru.plan.what_if import what_if
from kitaeru.recipe.types import Recipe

WISH = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
PAIR = parse_gpus("2x RTX A5000", "128GB")


def test_another_card_is_joined_to_all() -> None:
    _, more = what_if("add 1 GPU", WISH, PAIR)
    assert [device.index for device in more.devices] == [0, 1, 2]
    assert {(link.a, link.b) for link in more.links} == {(0, 1), (0, 2), (1, 2)}
    assert more == what_if("add 1 card", WISH, PAIR)[1]
    assert more.devices == parse_gpus("3x RTX A5000").devices


def test_nvlink_is_what_the_words_say() -> None:
    assert what_if("nvlink", WISH, PAIR)[1].links == parse_gpus("2x RTX A5000, nvlink").links


def test_ram_and_length() -> None:
    _, more = what_if("ram=256GB", WISH, PAIR)
    described = parse_gpus("2x RTX A5000", "256GB")
    assert (more.host_ram_bytes, more.host_free_bytes) == (described.host_ram_bytes, described.host_free_bytes)
    assert what_if("seq-len = 8192", WISH, PAIR)[0].data.seq_len == 8192
    assert what_if("seq_len=512", WISH, PAIR)[1] == PAIR


@pytest.mark.parametrize(
    ("text", "machine", "words"),
    [
        ("more speed", "RTX A5000", "not a change"),
        ("add 1 GPU", "none", "no GPU"),
        ("nvlink", "RTX A5000", "fewer"),
        ("nvlink", "2x RTX 4090", "no NVLink"),
        ("ram=lots", "RTX A5000", "not a size"),
    ],
)
def test_what_cannot_be_is_told(text: str, machine: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        what_if(text, WISH, parse_gpus(machine))
    assert caught.value.remedy
