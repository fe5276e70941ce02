"""What combine_ reports of its work: sums of squared changes and elements lost to rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, NAMES, assert_same_bits, bordered

import zo_kernels as zk

ADDRESS = {"seed": 1, "directions": [2, 3], "rounding": "stochastic"}


def plain_weights(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Finite weights as models have them, some of them zero."""
    generator = torch.Generator().manual_seed(count)
    values = (0.02 * torch.randn(count, generator=generator)).to(dtype)
    values[::7] = 0.0
    return values


def changes_of(old: torch.Tensor, acc: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """From the values themselves, in float64."""
    moved, wanted = new.double() - old.double(), acc.double() - old.double()
    lost = ((moved == 0) & (wanted != 0)).sum().double()
    return torch.stack([(moved**2).sum(), (wanted**2).sum(), lost])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums within 1e-5, counts equal."""
    actual = actual.cpu()
    torch.testing.assert_close(actual[:, :2], expected[:, :2], rtol=1e-5, atol=0.0)
    assert torch.equal(actual[:, 2], expected[:, 2])


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_changes(backend, device, dtype, distribution):
    """Against the values: ragged, misaligned, empty tensors, in place, with weight decay."""
    sizes, offsets = [9000, 0, 5, 1100], [0, 0, 2**34 - 2, 17]
    sources = [plain_weights(size, dtype) for size in sizes]
    scales = [[1e-5, 2e-5], [1.0, 1.0], [1e-3, 0.0], [3e-6, 1e-6]]
    rest = {
        **ADDRESS,
        "streams": [1, 2, 3, 4],
        "offsets": offsets,
        "src_scale": 0.999,
        "distribution": distribution,
    }
    accs = [torch.empty(size) for size in sizes]
    zk.combine_(accs, sources, scales, **rest, backend="reference")
    news = [source.clone() for source in sources]
    zk.combine_(news, news, scales, **rest, backend="reference")
    expected = torch.stack([changes_of(*x) for x in zip(sources, accs, news, strict=True)])
    if dtype != torch.float32:
        assert expected[0, 2] > 100  # many updates are lost, and many are not
        assert expected[0, 0] > 0

    places = [bordered(s, device, shift=i)[1] for i, s in enumerate(sources)]
    changes = torch.full((4, 3), torch.nan, dtype=torch.float64, device=device)
    zk.combine_(places, places, scales, **rest, changes=changes, backend=backend)
    assert_close(changes, expected)
    for place, new in zip(places, news, strict=True):
        assert_same_bits(place, new)


def test_in_place_and_out_of_place_pairs_in_one_list(backend, device):
    """Rows keep their places when the list is worked off in two parts."""
    sources = [plain_weights(300, torch.bfloat16).to(device) for _ in range(3)]
    out = torch.empty_like(sources[1])
    options = {"streams": [1, 2, 3], "backend": backend, **ADDRESS}
    apart = []
    for i in range(3):
        rows = torch.empty(1, 3, dtype=torch.float64, device=device)
        one = {**options, "streams": [i + 1]}
        zk.combine_([torch.empty_like(out)], [sources[i]], [1e-4, 1e-4], **one, changes=rows)
        apart.append(rows)
    changes = torch.empty(3, 3, dtype=torch.float64, device=device)
    zk.combine_([sources[0], out, sources[2]], sources, [1e-4, 1e-4], **options, changes=changes)
    assert torch.equal(changes, torch.cat(apart))


@pytest.mark.parametrize(
    "changes, message",
    [
        ([0.0], "changes: expected a tensor, got list"),
        (torch.zeros(1, 3), "changes: expected float64 of shape"),
        (torch.zeros(2, 3, dtype=torch.float64), "changes: expected float64 of shape"),
        (torch.zeros(1, 6, dtype=torch.float64)[:, ::2], "changes: expected a contiguous tensor"),
    ],
)
def test_unfit_tensors_are_refused(changes, message):
    weight = torch.ones(4)
    with pytest.raises((TypeError, ValueError), match=message):
        zk.combine_([weight], [weight], [1.0, 1.0], **ADDRESS, streams=[3], changes=changes)
    assert_same_bits(weight, torch.ones(4))
