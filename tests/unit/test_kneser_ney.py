"""The n-gram yardstick against a slow reading of the same formula, and as a distribution."""

from __future__ import annotations

from collections import Counter, defaultdict

import kneser_ney
import numpy as np
import pytest

TEXTS = [
    "すもももももももものうち",
    "庭には二羽鶏がいる",
    "うらにわにはにわとりがいる。もももある。",
    "東京特許許可局" * 2,
] * 2


def slow(texts: list[str], order: int, history: str, character: str) -> float:
    """p(character | history), straight from the paper with dictionaries; '^' stands for the start."""
    padded = ["^" * (order - 1) + text for text in texts]
    ends = [(text, end) for text in padded for end in range(order - 1, len(text))]
    types = {order: Counter(text[end - order + 1 : end + 1] for text, end in ends)}
    for k in range(order - 1, 0, -1):
        types[k] = Counter(gram[1:] for gram in types[k + 1])
    probability = 1 / (len(set("".join(texts))) + 1)
    history = "^" * (order - 1) + history
    for k in range(1, order + 1):
        n = Counter(types[k].values())
        y = n[1] / (n[1] + 2 * n[2])
        d = [0.0] + [max(0.0, i - (i + 1) * y * n[i + 1] / max(1, n[i])) for i in (1, 2, 3)]
        following = defaultdict(
            int, {g[-1]: c for g, c in types[k].items() if g[:-1] == history[len(history) - k + 1 :]}
        )
        total = sum(following.values())
        if total:
            left = sum(d[min(c, 3)] for c in following.values())
            count = following[character]
            probability = (count - d[min(count, 3)] + left * probability) / total
    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_agrees_with_the_formula(order: int) -> None:
    text = "ももがにわにいる特許"
    fast = kneser_ney.KneserNey(TEXTS, order).probabilities(text)
    expected = [slow(TEXTS, order, text[:i], text[i]) for i in range(len(text))]
    np.testing.assert_allclose(fast, expected, rtol=1e-12)


@pytest.mark.parametrize("history", ["", "も", "にわに", "見たことのない"])
def test_adds_up_to_one_over_all_of_unicode(history: str) -> None:
    model = kneser_ney.KneserNey(TEXTS, 4)
    known = sum(model.probabilities(history + character)[-1] for character in model.characters)
    one_stranger = model.probabilities(history + "☃")[-1]
    strangers = one_stranger * (kneser_ney.UNICODE_CHARACTERS - len(model.characters))
    assert one_stranger > 0
    assert known + strangers == pytest.approx(1.0, abs=1e-12)
