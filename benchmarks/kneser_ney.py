"""A character n-gram language model with interpolated modified Kneser–Ney smoothing, in numpy.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3: three discounts
for each order, lower orders estimated from the number of different characters seen before an n-gram. It is the
yardstick for the bundled model: what counting alone gets from the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# A character that training never saw is drawn evenly from the rest of Unicode (surrogates are not characters).
UNICODE_CHARACTERS = 0x110000 - 0x800


@dataclass(frozen=True)
class Order:
    """One order k of the model.

    `keys`: int64 [types], sorted; a key is the id of the first k-1 characters, times the number of symbols, plus the
    last. `discounted`: float64 [types], the count less its discount, over the context's total. `backoff`: float64
    [contexts], the weight of the next lower order, 1 where the context was never seen.
    """

    keys: Ints
    discounted: Floats
    backoff: Floats


class KneserNey:
    """Probability of each character given the `order` - 1 before it. The start of a document is a symbol of its own."""

    def __init__(self, documents: list[str], order: int = 5) -> None:
        self.order = order
        self.characters = sorted(set().union(*documents))
        self.index = {character: place for place, character in enumerate(self.characters, start=1)}
        self.unknown = len(self.characters) + 1
        self.symbols = len(self.characters) + 2  # 0 is the start of a document
        stream, predicted = self._encode(documents)
        self.orders = self._estimate(stream, predicted)

    def _encode(self, documents: list[str]) -> tuple[Ints, Ints]:
        """All documents in one row, each after order - 1 start symbols; and the places of the real characters."""
        pad = self.order - 1
        stream = np.zeros(sum(map(len, documents)) + pad * len(documents), dtype=np.int64)
        predicted, start = [], 0
        for document in documents:
            places = np.arange(start + pad, start + pad + len(document))
            stream[places] = [self.index.get(character, self.unknown) for character in document]
            predicted.append(places)
            start += pad + len(document)
        return stream, np.concatenate(predicted)

    def _estimate(self, stream: Ints, predicted: Ints) -> list[Order]:
        all_keys: list[Ints] = []
        counts: list[Ints] = []
        grams = np.zeros_like(stream)  # id of the k-gram that ends at each place; there is one 0-gram
        for k in range(1, self.order + 1):
            before = np.concatenate(([0], grams[:-1])) if k > 1 else grams
            keys, longer = np.unique(before * self.symbols + stream, return_inverse=True)
            seen = np.bincount(longer[predicted], minlength=len(keys))
            if k > 1:  # the lower order counts different continuations to the left, not occurrences
                example = np.zeros(len(keys), dtype=np.int64)
                example[longer[predicted]] = predicted
                counts[-1] = np.bincount(grams[example[seen > 0]], minlength=len(all_keys[-1]))
            all_keys.append(keys)
            counts.append(seen)
            grams = longer
        contexts = [1, *(len(keys) for keys in all_keys[:-1])]
        return [
            _discount(keys, count, keys // self.symbols, size)
            for keys, count, size in zip(all_keys, counts, contexts, strict=True)
        ]

    def probabilities(self, document: str) -> Floats:
        """Probability of each character of `document` (float64 [characters]), each given those before it."""
        stream, predicted = self._encode([document])
        result = np.full(len(predicted), 1.0 / (len(self.characters) + 1))
        grams = np.zeros_like(stream)
        for k, order in enumerate(self.orders, start=1):
            before = np.concatenate(([0], grams[:-1])) if k > 1 else grams
            keys = np.where(before < 0, -1, before * self.symbols + stream)
            place = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            grams = np.where(order.keys[place] == keys, place, -1)
            found, context = grams[predicted], before[predicted]
            own = np.where(found >= 0, order.discounted[found], 0.0)
            result = own + np.where(context >= 0, order.backoff[context], 1.0) * result
        strange = stream[predicted] == self.unknown
        result[strange] /= UNICODE_CHARACTERS - len(self.characters)
        return result


def _discount(keys: Ints, counts: Ints, contexts: Ints, context_count: int) -> Order:
    """Chen and Goodman's D1, D2, D3+ from the counts of counts, applied to every n-gram of one order."""
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    y = n1 / max(1, n1 + 2 * n2)
    ratios = (n2 / max(1, n1), n3 / max(1, n2), n4 / max(1, n3))
    discounts = [0.0, *(max(0.0, k - (k + 1) * y * ratio) for k, ratio in enumerate(ratios, start=1))]
    taken = np.array(discounts)[np.minimum(counts, 3)]
    total = np.bincount(contexts, weights=counts, minlength=context_count)
    given = np.bincount(contexts, weights=taken, minlength=context_count)
    backoff = np.where(total > 0, given / np.maximum(total, 1), 1.0)
    return Order(keys, (counts - taken) / np.maximum(total[contexts], 1), backoff)
