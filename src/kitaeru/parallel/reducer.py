"""Sums of gradients over all ranks, in buckets that are sent while the backward pass still runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 32 << 20
# Buckets under way at a time: more hold memory and do not fill the link any better.
UNDER_WAY = 4


class _Sent(NamedTuple):
    bucket: list[nn.Parameter]
    flat: torch.Tensor
    work: Any


class Reducer:
    """All ranks (of `group`) send the same buckets in the same order: it does not matter when a rank's own are full,
    nor whether it had a backward pass at all. A parameter that got no gradient on any rank keeps none, as on one
    device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES, group: Any = None) -> None:
        self._group = group
        # Gradients arrive about in the reverse order of the parameters.
        self._buckets = list(_buckets(list(reversed(parameters)), bucket_bytes))
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._watching = False
        self._missing: list[int] = []
        self._next = 0
        self._sent: deque[_Sent] = deque()
        self._counts: list[tuple[list[nn.Parameter], torch.Tensor]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def start(self) -> None:
        """The next backward pass is this rank's last: send what becomes complete."""
        self._watching = True
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Send the rest; afterwards every gradient is the sum over all ranks."""
        self._watching = False
        while self._next < len(self._buckets):
            self._send()
        while self._sent:
            self._take_in()
        for bucket, counts in self._counts:
            for parameter, count in zip(bucket, counts.tolist(), strict=True):
                if not count:
                    parameter.grad = None
        self._next, self._counts = 0, []

    def _arrived(self, parameter: torch.Tensor) -> None:
        if not self._watching:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        sizes = [parameter.numel() for parameter in bucket]
        # The last entries count on how many ranks each parameter has a gradient.
        flat = torch.zeros(sum(sizes) + len(bucket), dtype=bucket[0].dtype, device=bucket[0].device)
        self._next += 1  # only now: where there is no memory for it, it is sent later
        for place, (parameter, part) in enumerate(zip(bucket, flat.split([*sizes, len(bucket)]), strict=False)):
            if parameter.grad is not None:
                part.copy_(parameter.grad.reshape(-1))
                flat[sum(sizes) + place] = 1
        self._sent.append(_Sent(bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
        if len(self._sent) > UNDER_WAY:
            self._take_in()

    def _take_in(self) -> None:
        bucket, flat, work = self._sent.popleft()
        work.wait()
        *parts, counts = flat.split([*(parameter.numel() for parameter in bucket), len(bucket)])
        for parameter, part in zip(bucket, parts, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(part.view_as(parameter))
        self._counts.append((bucket, counts.clone()))


def _buckets(parameters: list[nn.Parameter], size_bytes: int) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        if bucket and (filled + parameter.nbytes > size_bytes or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.nbytes
    if bucket:
        yield bucket
