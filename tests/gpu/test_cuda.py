"""What a GPU computes is what the CPU computes, and a step does not wait for it. Needs a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import whole_moments
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import DataSettings, OptimSettings, TrainingSettings
from vswin_dist.data.transforms import pixel_ops
from vswin_dist.data.transforms.augment import augment, clip_rng
from vswin_dist.data.transforms.mixing import cross_entropy, mix
from vswin_dist.data.transforms.normalise import normalise, to_rgb
from vswin_dist.data.transforms.resample import crops_to_rgb
from vswin_dist.data.video.stored_crop import Crop, resized
from vswin_dist.device import Rank
from vswin_dist.model_card import ModelCard
from vswin_dist.models import VideoSwin, build_model
from vswin_dist.models.kernels import dispatch
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.models.swin.windows import batch_geometry
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint import CheckpointWriter, Part, Position, State
from vswin_dist.training.engine import Engine, be_deterministic
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.step_timer import StepTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available())")

GPU, CPU = "cuda", "cpu"
CLASSES, FRAMES, SIZE = 6, 16, 32
DATA = DataSettings(
    train="", frames=FRAMES, size=SIZE, rand_augment_ops=4, rand_augment_magnitude=20, erasing=1.0, mixup=0.8, cutmix=1.0
)


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
    """The fraction of values that differ by more than `by`."""
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
    geometry = batch_geometry(grid, (8, 7, 7), (4, 3, 3), "offset", 2, torch.device(GPU), dtype)
    rng = torch.Generator(GPU).manual_seed(0)
    shapes = (len(geometry.gather) // geometry.length, geometry.length, 3 * 4 * 32), (15 * 13 * 13, 4)
    qkv, table = (torch.randn(s, generator=rng, device=GPU).bfloat16().to(dtype).requires_grad_() for s in shapes)
    out = dispatch.window_attention(qkv, dispatch.window_bias(table, geometry, kernel), 4, geometry, kernel)
    out.backward(torch.randn(out.shape, generator=rng, device=GPU).bfloat16().to(dtype))
    assert qkv.grad is not None and table.grad is not None
    return out.detach(), qkv.grad, table.grad


@pytest.mark.parametrize("grid", [(16, 14, 14), (12, 10, 9), (4, 7, 7)])
def test_the_triton_kernels_compute_what_the_plain_path_does(grid: tuple[int, int, int]) -> None:
    wanted = attended("plain", torch.float64, grid)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for found, exact in zip(attended("triton", dtype, grid), wanted, strict=True):
            assert (found.double() - exact).norm() < within * exact.norm()


def test_the_triton_kernels_give_the_same_bits_every_time() -> None:
    runs = [attended("triton", torch.bfloat16, (16, 14, 14)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.fixture
def _free_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_free_afterwards")
@pytest.mark.parametrize("kernel", ["plain", "triton"])
def test_a_deterministic_training_run_gives_the_same_bits_every_time(kernel: str) -> None:
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


def test_stored_crops_become_the_same_rgb() -> None:
    crops = [Crop(40, 31, 20, 16, 1.0, 0.5, flip=True), Crop(21, 60, 11, 30, 0.0, -0.5, "bt709", True), resized(SIZE, False)]
    length = FRAMES * sum(crop.bytes for crop in crops)
    stored = torch.from_numpy(np.random.default_rng(2).integers(0, 256, length, dtype=np.uint8))
    found, wanted = (crops_to_rgb(stored.to(d), crops, FRAMES, SIZE) for d in (GPU, CPU))
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
            mix(
                normalise(clips().to(d), DATA.mean, DATA.std, torch.float32),
                torch.arange(4, device=d),
                CLASSES,
                DATA,
                0,
                step,
                0,
            )
            for d in (GPU, CPU)
        )
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.cpu(), expected)


STATE = tuple[dict[str, Tensor], dict[str, Tensor]]  # weights and moments by name, on the CPU


def engine_steps(
    device: str, stage: int, count: int, done: int = 0, state: STATE | None = None, **settings: Any
) -> tuple[list[float], STATE]:
    """The losses of `count` steps on one batch, in bf16 if not said, from `state` after `done` ones; the state then."""
    optim = OptimSettings(lr=1e-3, gradient_clipping=1.0)
    settings = {"precision": "bf16", **settings}
    training = TrainingSettings(workers=1, micro_batch=4, global_batch=4, zero_stage=stage, **settings)
    model = network()
    engine = Engine(model, parameter_groups(model, optim), training, optim, 1, torch.device(device))
    if state:
        engine.load_weights(state[0])
        engine.load_moments(state[1], done)
    inputs, labels = normalise(clips().to(device), DATA.mean, DATA.std, engine.input_dtype), torch.arange(4, device=device)
    losses = []
    for _ in range(count):
        engine.set_learning_rate(1.0)
        loss = cross_entropy(engine.forward(inputs, sample_keys(0, 0, labels)), labels, 0.0)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norm = engine.gradient_norm()
        assert norm > 0 and norm.device.type == device
    return losses, ({n: t.cpu().clone() for n, t in engine.weights()}, whole_moments(engine))


@pytest.mark.usefixtures("_no_waiting_afterwards")
def test_a_checkpoint_is_copied_while_the_host_goes_on(tmp_path: Path) -> None:
    """Steps that follow on the device change nothing of it, and the host waits for no copy."""
    count = 16 << 20
    weights, moments = torch.zeros(count, device=GPU), torch.zeros(count, device=GPU)
    writer = CheckpointWriter(str(tmp_path), Rank(0, 1, torch.device(GPU)), keep=9)
    writer.claim()
    for step in range(3):
        state = State({"w": (count,)}, [("w", weights)], [Part("exp_avg.w", (count,), 0, moments)])
        position = Position(step, 0, 0, "", "", {}, [], {})
        writer.finish()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first save makes room for the others
        writer.save(position, state, ModelCard({}, [], {}, {}))
        weights += 1
        moments -= 1
        torch.cuda.set_sync_debug_mode("default")
    writer.finish()
    for found in checkpoint.list_checkpoints(str(tmp_path)):
        value = float(found.position.step)
        assert checkpoint.load_weights(found.url)["w"].unique().tolist() == [value]
        assert checkpoint.load_moments(found.url)["exp_avg.w"].unique().tolist() == [-value]


STAGES = (0, 1, 2, 3)


def on_the_cpu() -> dict[int, tuple[list[float], STATE]]:
    """Of each ZeRO stage, the losses of four steps and the state after two."""
    return {stage: (engine_steps(CPU, stage, 4)[0], engine_steps(CPU, stage, 2)[1]) for stage in STAGES}


def on_the_gpu(cpu: dict[int, tuple[list[float], STATE]]) -> dict[int, tuple[list[float], list[float]]]:
    """Of each stage, the losses of four steps, and of the last two from the CPU's state after two."""
    return {stage: (engine_steps(GPU, stage, 4)[0], engine_steps(GPU, stage, 2, 2, cpu[stage][1])[0]) for stage in STAGES}


def test_the_engine_steps_as_on_the_cpu_and_goes_on_from_its_state() -> None:
    (cpu,) = run_ranks(1, on_the_cpu)
    (gpu,) = run_ranks(1, on_the_gpu, cpu, backend="nccl")
    for stage in STAGES:
        wanted, (losses, resumed) = cpu[stage][0], gpu[stage]
        assert losses == pytest.approx(wanted, rel=0.05) and losses[-1] < losses[0], stage
        assert resumed == pytest.approx(wanted[2:], rel=0.05), stage


def in_fp16() -> dict[int, list[float]]:
    """Of each stage, the losses of eight steps in fp16, from a scale that may have to be found first."""
    return {stage: engine_steps(GPU, stage, 8, precision="fp16")[0] for stage in STAGES}


def test_fp16_trains_in_every_stage() -> None:
    (cpu,) = run_ranks(1, on_the_cpu)
    for stage, losses in run_ranks(1, in_fp16, backend="nccl")[0].items():
        assert losses[0] == pytest.approx(cpu[stage][0][0], rel=0.05), stage
        assert losses[-1] < losses[0], stage


def on_the_host() -> dict[int, tuple[list[float], list[float]]]:
    """Of each stage that splits, the losses of four steps on the GPU, and with the states on the host."""
    return {s: (engine_steps(GPU, s, 4)[0], engine_steps(GPU, s, 4, offload=True)[0]) for s in STAGES if s}


def test_states_on_the_host_train_alike() -> None:
    for stage, (device, host) in run_ranks(1, on_the_host, backend="nccl")[0].items():
        assert host == pytest.approx(device, rel=0.02), stage


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
    first = [feed_and_step(model, optimizer, batch, labels, step) for step in range(2)]  # geometries and constants are made
    torch.cuda.set_sync_debug_mode("error")
    later = [feed_and_step(model, optimizer, batch, labels, step) for step in range(2, 12)]
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(first + later).isfinite().all()


def test_parts_of_a_step_are_timed_by_the_device_without_a_wait() -> None:
    timer = StepTimer(torch.device(GPU))
    torch.cuda._sleep(10**9)  # until its clock is at its height
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part, cycles in (("forward", 10**8), ("backward", 10**9)):
            with timer(part, 1):  # type: ignore[arg-type]
                torch.cuda._sleep(cycles)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    taken = timer.take()
    assert taken["backward"] > 3 * taken["forward"] > 0.03  # 10 times at the same clock, of at most 3 GHz
