"""Window geometries: every token once, padding apart, masks of at most eight patterns, indices by true offset."""

from __future__ import annotations

import pytest
import torch

from tests.parity.reference_swin import partition, relative_index, shift_mask
from vswin_dist.models.kernels.dispatch import from_windows, to_windows
from vswin_dist.models.swin.windows import WindowGeometry, batch_geometry, bias_index, region_mask

GRIDS = [((4, 14, 14), (2, 7, 7)), ((5, 9, 10), (2, 4, 3)), ((3, 7, 20), (8, 7, 7)), ((1, 1, 1), (8, 7, 7))]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_hold_what_roll_and_partition_give(grid: tuple, window: tuple, shifted: bool) -> None:
    shift = tuple(w // 2 for w in window) if shifted else (0, 0, 0)
    geometry = WindowGeometry(grid, window, shift)
    assert len(geometry.patterns) <= 8
    token = torch.full(geometry.padded, geometry.tokens)
    token[: grid[0], : grid[1], : grid[2]] = torch.arange(geometry.tokens).view(grid)
    rolled = torch.roll(token, [-s for s in geometry.shift], (0, 1, 2))
    expected = partition(rolled[None, ..., None], geometry.window).squeeze(-1)
    masks = torch.zeros(geometry.windows, geometry.length, geometry.length)
    if any(geometry.shift):
        masks = shift_mask(geometry.padded, geometry.window, geometry.shift)
    found = {tuple(row.tolist()): mask for row, mask in zip(expected, masks, strict=True)}
    for pattern in geometry.patterns:
        mask = region_mask(geometry.window, pattern.cut, CPU, torch.float32)
        for row in geometry.gather[pattern.start : pattern.stop]:
            assert torch.equal(found[tuple(row.tolist())], mask)


@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_permutation_and_its_gradient(grid: tuple, window: tuple) -> None:
    geometry = batch_geometry(grid, window, tuple(w // 2 for w in window), "offset", 2, CPU, torch.float64)
    x = torch.randn(2, geometry.tokens, 3, dtype=torch.float64, requires_grad=True)
    windows = to_windows(x, geometry)
    assert torch.equal(from_windows(windows, geometry), x)
    assert windows.abs().sum().item() == pytest.approx(x.abs().sum().item())  # padding is zero
    torch.autograd.gradcheck(lambda y: to_windows(y, geometry).square(), x) if x.numel() < 200 else None
    weights = torch.randn_like(windows)
    (windows * weights).sum().backward()
    assert torch.equal(x.grad, from_windows(weights, geometry))


@pytest.mark.parametrize("window", [(2, 3, 3), (4, 2, 5)])
def test_bias_index(window: tuple) -> None:
    length = window[0] * window[1] * window[2]
    full = relative_index(window)
    for indexing in ("offset", "official"):
        assert torch.equal(bias_index(window, window, indexing, CPU).view(length, length), full)
    used = (window[0], 2, 2)
    part = used[0] * 4
    assert torch.equal(bias_index(window, used, "official", CPU).view(part, part), full[:part, :part])
    offset = bias_index(window, used, "offset", CPU).view(part, part)
    assert not torch.equal(offset, full[:part, :part])
    assert offset[0, 0] == full[0, 0]  # offset (0, 0, 0)


def test_plans_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        geometry = batch_geometry((3, 11, 13), (2, 3, 3), (1, 1, 1), "offset", 1, CPU, torch.float32)
    assert not geometry.gather.is_inference()
    assert geometry is batch_geometry((3, 11, 13), (2, 3, 3), (1, 1, 1), "offset", 1, CPU, torch.float32)
