"""Outputs and gradients equal those of the plain reference, over paddings, clampings, windows and shifts."""

from __future__ import annotations

import pytest
import torch

from tests.parity.reference_swin import ReferenceSwin
from vswin_dist.models import build_model

SMALL = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
CASES = [  # clip T, H, W and settings
    ((16, 56, 56), {"window_size": (4, 7, 7)}),  # divides everywhere, shifts on every axis
    ((2, 8, 8), {"window_size": (8, 7, 7)}),  # the smallest clip: clamped on every axis
    ((9, 37, 50), {"window_size": (2, 3, 4)}),  # divides nowhere, even window
    ((12, 30, 64), {"window_size": (4, 7, 7)}),  # padded in time and space
    ((6, 20, 64), {"window_size": (8, 7, 7)}),  # clamped in time and height, shifted in width
    ((16, 16, 16), {"window_size": (3, 7, 7)}),  # clamped in space, shifted in time
    ((8, 40, 40), {"window_size": (2, 5, 5), "shift": "spatial"}),
    ((8, 40, 40), {"window_size": (2, 5, 5), "shift": "none"}),
    ((5, 33, 41), {"window_size": (1, 4, 4), "patch_size": (1, 4, 4)}),
    ((16, 48, 48), {"window_size": (2, 5, 5), "patch_size": (4, 8, 8)}),
]


def pair(settings: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    model = build_model("swin_t", **{**SMALL, **settings}, drop_path_rate=0.0, head_dropout=0.0).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.3 * torch.randn(p.shape, dtype=torch.float32))
    reference = ReferenceSwin(model.settings).to(dtype)
    reference.load_state_dict(model.state_dict(), strict=True)
    return model, reference


@pytest.mark.parametrize("bias_index", ["offset", "official"])
@pytest.mark.parametrize(("size", "settings"), CASES)
def test_outputs_and_gradients_in_float64(size: tuple[int, ...], settings: dict, bias_index: str) -> None:
    model, reference = pair({**settings, "bias_index": bias_index}, torch.float64)
    clips = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = clips.clone().requires_grad_(), clips.clone().requires_grad_()
    features = model.forward_features(ours)
    expected = reference.forward_features(theirs)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(features)
    (features * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    named = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-9, atol=1e-8, msg=name)


@pytest.mark.parametrize(("size", "settings"), CASES[:5])
def test_float32_in_training_and_inference(size: tuple[int, ...], settings: dict) -> None:
    """float32 takes faster paths than float64 on some devices, and inference others than training."""
    model, reference = pair(settings, torch.float32)
    clips = torch.randn(2, 3, *size)
    expected = reference(clips)
    expected.square().sum().backward()
    got = model.train()(clips)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(clips), expected, rtol=1e-4, atol=1e-4)
    named = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        want = named[name].grad
        error = (parameter.grad - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error < 1e-3, f"{name}: {error:.1e} of the largest gradient"


def test_bfloat16_is_near() -> None:
    model, reference = pair({"window_size": (2, 4, 4)}, torch.float32)
    clips = torch.randn(2, 3, 8, 48, 48)
    expected = reference(clips)
    got = model.to(torch.bfloat16).eval()(clips.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()
