"""DeepSpeed, and nothing of it elsewhere: the engine of one rank, and its state keyed by parameter name.

DeepSpeed's own checkpoints cannot change the number of ranks or the ZeRO stage with several parameter groups. The
state here is one full tensor for each parameter and moment, gathered from and scattered to the partitions of any
stage. That uses private names of DeepSpeed (the release is pinned): `_lazy_init_hp_params_optimizer_state` of stages
1 and 2, `fp32_partitioned_groups_flat` of stage 3.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.training.optim import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that this torch warns of, several times a step.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory collectives of CPU ranks would be compiled at first use, for over a minute; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(training: TrainingSettings, optim: OptimSettings, accumulation: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. ZeRO 0 in bf16 keeps fp32 weights and runs under autocast."""
    bf16 = training.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.gradient_clipping,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": training.zero_stage, "overlap_comm": torch.cuda.is_available()},
        # The overflow check waits for the GPU at every step, and leaves steps out in silence: `loop.flush` stops instead.
        "bf16": {"enabled": bf16 and training.zero_stage > 0, "check_grad_overflow": False},
        "torch_autocast": {"enabled": bf16 and training.zero_stage == 0, "dtype": "bfloat16"},
    }
    if bf16 and training.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class Engine:
    """One rank's model under ZeRO, with AdamW over named parameter groups.

    Args:
        model: on the CPU in fp32, the same on every rank; moved to `device` and cast as the settings say.
        groups: which parameters share a rate; see `optim.parameter_groups`.
        accumulation: micro-batches of one optimizer step.
    """

    def __init__(self, model: nn.Module, groups: list[ParameterGroup], training: TrainingSettings,
                 optim: OptimSettings, accumulation: int, device: torch.device) -> None:
        deepspeed = _import_deepspeed()
        self._gathered = deepspeed.zero.GatheredParameters
        self._tensors = deepspeed.utils
        self.stage = training.zero_stage
        self.groups, self.lr = groups, optim.lr
        self.input_dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.device = device
        exact = {n: p.detach().clone() for n, p in model.named_parameters()} if training.precision == "bf16" else {}
        parameters = dict(model.to(device).named_parameters())
        optimizer = torch.optim.AdamW(
            [{"params": [parameters[n] for n in g.names], "weight_decay": g.weight_decay, "lr": g.lr_factor * optim.lr}
             for g in groups], betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(training, optim, accumulation),
            dist_init_required=False)
        if exact:  # the fp32 master weights were made from weights already rounded to bf16
            self.load_weights(exact)

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def forward(self, clips: Tensor, sample_keys: Tensor) -> Tensor:
        """Logits [B, num_classes] of clips [B, 3, T, H, W]; `sample_keys` int64 [B] seed drop path and dropout."""
        logits: Tensor = self.engine(clips, sample_keys)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss; DeepSpeed divides by the accumulation."""
        self.engine.backward(loss)

    def step(self) -> None:
        """After each micro-batch; steps the optimizer after the last of an accumulation."""
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.engine._global_grad_norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()

    def set_learning_rate(self, factor: float) -> list[float]:
        """Give every group its rate times `factor`; returns the rates."""
        rates = [g.lr_factor * self.lr * factor for g in self.groups]
        for target in {id(o): o for o in (self.optimizer, self._base_optimizer)}.values():
            for group, rate in zip(target.param_groups, rates, strict=True):
                group["lr"] = rate
        return rates

    def gradient_norm(self) -> Tensor:
        """The global norm of the last step's gradient, before clipping; on the device, where nothing waits for it."""
        norm = self.engine.get_global_grad_norm()
        return norm.detach().float() if isinstance(norm, Tensor) else torch.full((), float(norm), device=self.device)

    # --- the portable state -------------------------------------------------------------------------------------

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return base

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that the base optimizer steps on this rank."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base_optimizer.param_groups for p in group["params"]]

    def _relink(self) -> None:
        """Let stages 1 and 2 find the moments of every group (without, those after the first are missed)."""
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 tensor) of every parameter. Collective: all ranks iterate together."""
        for name, p in self.module.named_parameters():
            yield name, p.detach() if self.stage == 0 else self._tensors.safe_get_full_fp32_param(p)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """("exp_avg.NAME" or "exp_avg_sq.NAME", full fp32 tensor), after at least one step. Collective."""
        self._relink()
        for name, p in self.module.named_parameters():
            for moment in MOMENTS:
                if self.stage == 0:
                    yield f"{moment}.{name}", self._base_optimizer.state[p][moment]
                else:
                    yield f"{moment}.{name}", self._tensors.safe_get_full_optimizer_state(p, moment)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set every parameter, in the model's precision and in the fp32 master copy. Collective for stage 3."""
        for name, p in self.module.named_parameters():
            value = weights[name].to(self.device)
            if self.stage == 3:
                with self._gathered([p], modifier_rank=0):
                    if torch.distributed.get_rank() == 0:
                        p.data.copy_(value)
                self._tensors.safe_set_local_fp32_param(p, self._local_slice(p, value))
            else:
                p.data.copy_(value)
                if self.stage:
                    self._tensors.safe_set_full_fp32_param(p, value.float())

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Set AdamW's moments and its step count (of the bias correction)."""
        for flat in self._partitions():
            self._base_optimizer.state[flat] = {
                "step": torch.tensor(float(step)), **{m: torch.zeros_like(flat) for m in MOMENTS}}
        self._relink()
        for name, p in self.module.named_parameters():
            for moment in MOMENTS:
                value = moments[f"{moment}.{name}"].to(self.device)
                if self.stage == 0:
                    self._base_optimizer.state[p][moment].copy_(value)
                elif self.stage == 3:
                    self._tensors.safe_set_local_optimizer_state(p, self._local_slice(p, value), moment)
                else:
                    self._tensors.safe_set_full_optimizer_state(p, value, moment)
        self.engine.global_steps = step

    def _local_slice(self, p: Any, value: Tensor) -> Tensor:
        """This rank's part of a full tensor in stage 3: padded to the partitions' size, then cut."""
        size = p.ds_tensor.ds_numel if hasattr(p.ds_tensor, "ds_numel") else p.ds_tensor.numel()
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        flat = torch.zeros(size * world, dtype=torch.float32, device=value.device)
        flat[:value.numel()] = value.flatten().float()
        return flat[rank * size:(rank + 1) * size]

    @contextmanager
    def full_module(self) -> Iterator[nn.Module]:
        """The module for evaluation, on clips of `input_dtype`; stage 3 gathers each layer as it runs.

        Stage 0 in bf16 keeps fp32 weights: as in `forward`, where DeepSpeed sees to it, it runs under autocast.
        """
        was_training = self.module.training
        self.module.eval()
        mixed = self.stage == 0 and self.input_dtype == torch.bfloat16
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                yield self.module
        finally:
            self.module.train(was_training)
