"""Clips become RGB and are normalised the same from either form."""

import numpy as np
import pytest
import torch

import vswin_dist.data.transforms.normalise as transforms
from vswin_dist.data.transforms.normalise import constant, normalise, to_rgb

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# BT.601 of limited range: name -> (Y, Cb, Cr), (R, G, B)
KNOWN = {
    "black": ((16, 128, 128), (0, 0, 0)),
    "white": ((235, 128, 128), (255, 255, 255)),
    "red": ((81, 90, 240), (254, 0, 0)),
    "green": ((145, 54, 34), (0, 255, 1)),
    "blue": ((41, 240, 110), (0, 0, 255)),
    "below black": ((5, 128, 128), (0, 0, 0)),
}


def planes(values: tuple[int, int, int], time: int = 2, size: int = 8) -> torch.Tensor:
    """uint8 [1, T, S * S * 3 / 2] of one colour."""
    parts = [
        torch.full((1, time, n), v, dtype=torch.uint8)
        for v, n in zip(values, (size**2, size**2 // 4, size**2 // 4), strict=True)
    ]
    return torch.cat(parts, 2)


def test_planes_become_the_colours_of_the_standard() -> None:
    for name, (stored, wanted) in KNOWN.items():
        rgb = to_rgb(planes(stored))
        assert rgb.shape == (1, 3, 2, 8, 8) and rgb.dtype == torch.uint8
        assert (rgb[0].float().mean((1, 2, 3)) - torch.tensor(wanted)).abs().max() <= 1, name


def test_every_sample_lands_on_its_pixel() -> None:
    """Luma at its place; chroma between its four pixels: rising along a row of 4 from 0 to 1 as 0, 1/4, 3/4, 1."""
    luma = torch.arange(16, dtype=torch.uint8).view(4, 4) * 4 + 100
    chroma = torch.tensor([[100, 140], [100, 140]], dtype=torch.uint8)
    grey = torch.full((2, 2), 128, dtype=torch.uint8)
    rgb = to_rgb(torch.cat([luma.flatten(), chroma.flatten(), grey.flatten()])[None, None])[0, :, 0].double()
    assert torch.equal(rgb[0], ((luma.double() - 16) * 255 / 219).round())  # red: without Cb
    rise = rgb[2] - rgb[0]
    expected = (torch.tensor([100.0, 110.0, 130.0, 140.0]).double() - 128) * 255 / 224 * 1.772
    assert (rise - expected).abs().max() <= 1


def test_rgb_is_normalised_per_channel() -> None:
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 8, 8), dtype=np.uint8))
    made = normalise(clips, MEAN, STD, torch.float32)
    for c in range(3):
        assert torch.allclose(made[:, c], (clips[:, c].float() - MEAN[c]) / STD[c])
    assert normalise(clips, MEAN, STD, torch.bfloat16).dtype == torch.bfloat16
    white = normalise(planes(KNOWN["white"][0]), MEAN, STD, torch.float32)
    assert torch.allclose(white, normalise(torch.full((1, 3, 2, 8, 8), 255, dtype=torch.uint8), MEAN, STD, torch.float32))


def test_mean_and_std_are_sent_once_and_serve_training_after_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(transforms, "send", lambda tensor, device: sent.append(tensor) or tensor)
    clips, mean = torch.zeros(1, 3, 1, 2, 2, dtype=torch.uint8), (1.0, 2.0, 3.0)
    with torch.inference_mode():
        normalise(clips, mean, (9.0, 8.0, 7.0), torch.float32)
    normalise(clips, mean, (9.0, 8.0, 7.0), torch.float32)
    assert len(sent) == 2
    assert not constant(mean, clips.device).is_inference()
    constant.cache_clear()
