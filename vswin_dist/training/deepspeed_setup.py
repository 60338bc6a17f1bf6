"""How DeepSpeed is imported and configured, and what of it is replaced: with `engine`, all that knows of it.

Replaced are functions by which a step waits for the GPU, each by one that gives the same bits without. After a wait the
GPU's queue is empty, and it stands still while the host starts the next kernels: 4% of a step of swin_t.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vswin_dist.config.schema import OptimSettings, TrainingSettings

MIN_LOSS_SCALE, GROWTH_INTERVAL = 1, 2000  # of fp16; the scale doubles after so many steps without an overflow, as PyTorch's


def mask_nan_or_inf_with_val_inplace(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Put `val` in the place of a norm that is not finite; DeepSpeed's copies `val` to the device and back first."""
    norm.masked_fill_(~norm.isfinite(), val)


def clip_tensors_by_global_norm(
    input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, mpu: Any = None, eps: float = 1e-6
) -> Tensor:
    """Scale the tensors to a norm of `max_norm` at most, with a factor of 1 where DeepSpeed's asks and does nothing."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + eps)).clamp(max=1.0))
    return global_norm


BF16, ZERO = "deepspeed.runtime.bf16_optimizer", "deepspeed.runtime.zero.stage_1_and_2"
WAITLESS: dict[str, tuple[Callable[..., Any], ...]] = {
    "deepspeed.runtime.utils": (mask_nan_or_inf_with_val_inplace,),
    BF16: (clip_tensors_by_global_norm,),
    ZERO: (mask_nan_or_inf_with_val_inplace,),
    "deepspeed.runtime.zero.stage3": (mask_nan_or_inf_with_val_inplace,),
}


@contextmanager
def without_a_look_at_the_norm() -> Iterator[None]:
    """Let stages 1 and 2 make their update whatever the norm is: `skipped_steps` looks at it later, and stops."""
    with ExitStack() as patches:
        for module in (BF16, ZERO):
            patches.enter_context(patch(f"{module}.is_invalid_grad_norm", lambda norm: False))
        yield


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Let imports of a package fail, where it is not loaded yet."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment] # how Python is told so
    try:
        yield
    finally:
        del sys.modules[package]


@cache
def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, without what takes seconds and is not used; returns the package."""
    os.environ["DS_ACCELERATOR"] = device.type  # else the ranks of CPUs take a GPU that the machine has
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that this torch warns of, several times a step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    with _absent("mlflow"):  # its tuner, which nothing here uses, imports it: two seconds of each rank
        import deepspeed

    # DeepSpeed asks whether the optimizer is Muon, whose module compiles a function as it is imported: 3 s in each rank for
    # the import of the whole compiler.
    with patch.object(torch, "compile", lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # No operation of its own: the shared-memory collectives of CPU ranks would be compiled at first use, for over a minute,
    # where gloo serves, and to ask which others could be starts compilers.
    deepspeed.ops.__compatible_ops__ = {}
    # bf16 collects garbage a dozen times as it begins, half a second each, to print 30 lines of the memory then in use.
    importlib.import_module("deepspeed.runtime.bf16_optimizer").see_memory_usage = lambda message, force=False: None  # type: ignore[attr-defined]
    for module, functions in WAITLESS.items():
        for function in functions:
            setattr(importlib.import_module(module), function.__name__, function)
    return deepspeed


def deepspeed_config(
    training: TrainingSettings, optim: OptimSettings, accumulation: int, device: torch.device
) -> dict[str, Any]:
    """Make what `deepspeed.initialize` is given. ZeRO 0 in bf16 and fp16 keeps fp32 weights and runs under autocast."""
    bf16, fp16 = training.precision == "bf16", training.precision == "fp16"
    zero = training.zero_stage > 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.gradient_clipping,
        "steps_per_print": 1 << 60,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before and after each step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": training.zero_stage, "overlap_comm": device.type == "cuda"},
        # The overflow check waits for the GPU at every step. Without it `skipped_steps` finds out later, and stops.
        "bf16": {"enabled": bf16 and zero, "check_grad_overflow": optim.max_skipped_steps > 0},
        "torch_autocast": {"enabled": (bf16 or fp16) and not zero, "dtype": "float16" if fp16 else "bfloat16"},
    }
    if (bf16 or fp16) and zero:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if fp16 and zero:
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # a dynamic one, that is halved by each overflow as PyTorch's is
            "hysteresis": 1,
            "min_loss_scale": MIN_LOSS_SCALE,
            "loss_scale_window": GROWTH_INTERVAL,
        }
    if training.offload:
        # PyTorch's AdamW updates on the host too, with the bits that it has elsewhere; DeepSpeed's own needs a compiler.
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return config
