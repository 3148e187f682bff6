"""Gradients summed in buckets, whatever each rank has."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("bucket_bytes", [1, 40, 1 << 20])
def test_sums_whoever_has_gradients(crew, tmp_path, bucket_bytes):
    for answer in crew.run(tmp_path, 3, crew.uneven, bucket_bytes=bucket_bytes):
        for step, (first, second, third) in enumerate(answer["grads"]):
            assert torch.equal(first, torch.full((5,), 2.0 * (1 + step + 2 + step)))  # ranks 0 and 1, twice each
            assert torch.equal(second, torch.full((3, 2), 6.0))
            assert third is None  # as on one device: no gradient, and no weight decay
