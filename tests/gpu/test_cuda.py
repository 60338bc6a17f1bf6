"""What a GPU computes is what the CPU computes, and a step does not wait for it. Needs a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from vswin_dist.config.schema import DataSettings, OptimSettings, TrainingSettings
from vswin_dist.data import pixel_ops
from vswin_dist.data.augment import augment, clip_rng
from vswin_dist.data.mixing import cross_entropy, mix
from vswin_dist.data.transforms import normalise, to_rgb
from vswin_dist.models import VideoSwin, build_model, ops
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.models.windows import batch_plan
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.start import be_deterministic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available())")

GPU, CPU = "cuda", "cpu"
CLASSES, FRAMES, SIZE = 6, 16, 32
DATA = DataSettings(train="", frames=FRAMES, size=SIZE, rand_augment_ops=4, rand_augment_magnitude=20, erasing=1.0,
                    mixup=0.8, cutmix=1.0)


def network(**settings: Any) -> VideoSwin:
    torch.manual_seed(0)
    return build_model("swin_nano", num_classes=CLASSES, drop_path_rate=0.2, head_dropout=0.5, **settings)


def clips(count: int = 4) -> Tensor:
    """uint8 [B, 3, T, S, S]: a smooth gradient under noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 128, (count, 3, FRAMES, SIZE, SIZE), dtype=np.uint8)
    return torch.from_numpy(noise + np.arange(SIZE, dtype=np.uint8) * 3)


def planes(count: int = 4) -> Tensor:
    """uint8 [B, T, S * S * 3 / 2]."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(16, 236, (count, FRAMES, SIZE * SIZE * 3 // 2), dtype=np.uint8))


def differing(a: Tensor, b: Tensor, by: int = 0) -> float:
    """The share of values that differ by more than `by`."""
    return ((a.cpu().int() - b.cpu().int()).abs() > by).float().mean().item()


def gradients(device: str, dtype: torch.dtype, **settings: Any) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and the flat gradient of a training step's forward and backward, float32 on the CPU."""
    model = network(**settings).to(device, dtype).train()
    inputs = normalise(clips().to(device), DATA.mean, DATA.std, dtype)
    logits = model(inputs, sample_keys(0, 3, torch.arange(4, device=device)))
    cross_entropy(logits, torch.arange(4, device=device), 0.1).backward()
    grads = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return logits.detach().float().cpu(), torch.cat(grads)


def test_forward_and_backward_in_bf16_are_those_of_the_cpu() -> None:
    (found, slope), (wanted, reference) = gradients(GPU, torch.bfloat16), gradients(CPU, torch.float32)
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(slope, reference, dim=0) > 0.99


def attended(kernel: str, dtype: torch.dtype, grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Output of attention in windows of 8 x 7 x 7, shifted, and its gradients to the projection and the bias table.

    What goes in are numbers of bfloat16, whatever the dtype.
    """
    plan = batch_plan(grid, (8, 7, 7), (4, 3, 3), "offset", 2, torch.device(GPU), dtype)
    rng = torch.Generator(GPU).manual_seed(0)
    shapes = (len(plan.gather) // plan.length, plan.length, 3 * 4 * 32), (15 * 13 * 13, 4)
    qkv, table = (torch.randn(s, generator=rng, device=GPU).bfloat16().to(dtype).requires_grad_() for s in shapes)
    out = ops.window_attention(qkv, ops.window_bias(table, plan, kernel), 4, plan, kernel)
    out.backward(torch.randn(out.shape, generator=rng, device=GPU).bfloat16().to(dtype))
    assert qkv.grad is not None and table.grad is not None
    return out.detach(), qkv.grad, table.grad


@pytest.mark.parametrize("grid", [(16, 14, 14), (12, 10, 9), (4, 7, 7)])
def test_the_triton_kernels_compute_what_the_plain_path_does(grid: tuple[int, int, int]) -> None:
    wanted = attended("plain", torch.float64, grid)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for found, exact in zip(attended("triton", dtype, grid), wanted, strict=True):
            assert (found.double() - exact).norm() < within * exact.norm()


def test_the_triton_kernels_give_the_same_bits_again() -> None:
    runs = [attended("triton", torch.bfloat16, (16, 14, 14)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.fixture
def _free_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_free_afterwards")
@pytest.mark.parametrize("kernel", ["plain", "triton"])
def test_a_deterministic_training_gives_the_same_bits_again(kernel: str) -> None:
    be_deterministic()
    runs = [gradients(GPU, torch.bfloat16, attention_kernel=kernel)[1] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": "selective"}, {"compile": True}])
def test_training_with_the_triton_kernels(settings: dict) -> None:
    found, slope = gradients(GPU, torch.bfloat16, attention_kernel="triton", **settings)
    wanted, reference = gradients(CPU, torch.float32)
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(slope, reference, dim=0) > 0.99


def test_planes_become_the_same_rgb() -> None:
    found, wanted = to_rgb(planes().to(GPU)), to_rgb(planes())
    assert found.device.type == GPU
    assert differing(found, wanted, by=1) == 0 and differing(found, wanted) < 0.01


def test_augmented_clips_are_the_same() -> None:
    for number in range(20):  # four of the 18 operations each, and erasing
        found, wanted = (augment(clips(1)[0].to(d), DATA, clip_rng(0, 0, number)) for d in (GPU, CPU))
        assert differing(found, wanted) < 1e-3, number
    assert differing(pixel_ops.equalize(clips(1)[0].to(GPU)), pixel_ops.equalize(clips(1)[0])) == 0


def test_mixed_clips_and_targets_are_the_same() -> None:
    for step in range(4):
        (found, targets), (wanted, expected) = (
            mix(normalise(clips().to(d), DATA.mean, DATA.std, torch.float32), torch.arange(4, device=d), CLASSES, DATA, 0,
                step, 0) for d in (GPU, CPU))
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.cpu(), expected)


def engine_losses(device: str) -> list[float]:
    """The losses of four steps at ZeRO-2 in bf16 on one batch."""
    optim = OptimSettings(lr=1e-3, gradient_clipping=1.0)
    training = TrainingSettings(workers=1, micro_batch=4, global_batch=4, zero_stage=2, precision="bf16")
    model = network()
    engine = Engine(model, parameter_groups(model.named_parameters(), optim), training, optim, 1, torch.device(device))
    inputs, labels = normalise(clips().to(device), DATA.mean, DATA.std, engine.input_dtype), torch.arange(4, device=device)
    losses = []
    for _ in range(4):
        engine.set_learning_rate(1.0)
        loss = cross_entropy(engine.forward(inputs, sample_keys(0, 0, labels)), labels, 0.0)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert engine.gradient_norm() > 0
    return losses


def test_the_engine_steps_at_stage_2_as_on_the_cpu() -> None:
    (found,), (wanted,) = run_ranks(1, engine_losses, GPU, backend="nccl"), run_ranks(1, engine_losses, CPU)
    assert found == pytest.approx(wanted, rel=0.05) and found[-1] < found[0]


def feed_and_step(model: VideoSwin, optimizer: torch.optim.Optimizer, batch: Tensor, labels: Tensor, step: int) -> Tensor:
    """What the training loop does with a pinned micro-batch of planes, but for DeepSpeed; the loss, on the device."""
    device, dtype = model.head.weight.device, model.head.weight.dtype
    rgb = to_rgb(batch.to(device, non_blocking=True))
    rgb = torch.stack([augment(c, DATA, clip_rng(0, 0, 4 * step + i)) for i, c in enumerate(rgb)])
    on_device = labels.to(device, non_blocking=True)
    inputs, targets = mix(normalise(rgb, DATA.mean, DATA.std, dtype), on_device, CLASSES, DATA, 0, step, 0)
    loss = cross_entropy(model(inputs, sample_keys(0, step, on_device)), targets, 0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.fixture
def _no_waiting_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting_afterwards")
@pytest.mark.parametrize("kernel", ["plain", "triton"])
def test_a_steady_step_waits_for_nothing(kernel: str) -> None:
    model = network(attention_kernel=kernel).to(GPU, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch, labels = planes().pin_memory(), torch.arange(4).pin_memory()
    first = [feed_and_step(model, optimizer, batch, labels, step) for step in range(2)]  # plans and constants are made
    torch.cuda.set_sync_debug_mode("error")
    later = [feed_and_step(model, optimizer, batch, labels, step) for step in range(2, 12)]
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(first + later).isfinite().all()
