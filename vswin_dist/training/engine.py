"""The engine of one rank under DeepSpeed, and its state keyed by parameter name; how DeepSpeed is set up: `deepspeed_setup`.

DeepSpeed's own checkpoints cannot change the number of ranks or the ZeRO stage with several parameter groups. The
state here is one tensor for each parameter and moment, the moments in the parts that ranks hold of them; it is scattered to
the partitions of any stage. That uses private names of DeepSpeed (the release is pinned):
`_lazy_init_hp_params_optimizer_state` of stages 1 and 2 and the `_hp_mapping` of their parameters,
`fp32_partitioned_groups_flat` of stage 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.training.checkpoint import Part, State
from vswin_dist.training.deepspeed_setup import (
    GROWTH_INTERVAL,
    MIN_LOSS_SCALE,
    deepspeed_config,
    import_deepspeed,
    without_a_look_at_the_norm,
)
from vswin_dist.training.optim import ParameterGroup
from vswin_dist.training.step_metrics import Outcome

EMA = "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def be_deterministic() -> None:
    """Have PyTorch take algorithms that give the same bits again, in this process; before the GPU is used.

    Without it, on a GPU, the gradients of the bias tables are summed by atomics (not by the Triton kernels), and so are some
    of attention and of the products.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # all of it is written before it is read


def aligned(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Put those last whose elements do not fill multiples of 16 bytes in bf16, such as most bias tables.

    ZeRO lays the parameters of a group one behind the other in a flat tensor. One that begins between multiples of 16 bytes
    takes the slow kernels of products and norms: a step of swin_t took a third more of a GPU's time.
    """
    return sorted(parameters, key=lambda p: p.numel() % 8 != 0)


class EngineAdamW(torch.optim.AdamW):
    """AdamW that changes nothing where `overflow` is set, nor a group that is marked `frozen`; it may average the weights.

    DeepSpeed reads `overflow`, as it does that of its own optimizers. The average (EMA) of the weights after each update is
    part of the state, beside the moments; it begins with the weights before the first update.
    """

    overflow = False
    ema_decay = 0.0  # 0: no average

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Do as PyTorch's, but for its decorator, which imports the compiler: 2.6 s of each rank's start."""
        torch.optim.AdamW.add_param_group.__wrapped__(self, param_group)  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights, or leave the step out."""
        if self.overflow:
            return None
        everything = self.param_groups
        self.param_groups = [g for g in everything if not g.get("frozen")]  # ZeRO has gradients of 0 for them
        updated = [p for g in self.param_groups for p in g["params"] if p.grad is not None] if self.ema_decay else []
        before = {p: p.detach().clone() for p in updated if not self.state[p]}
        try:
            loss = torch.optim.AdamW.step.__wrapped__(self, closure)  # type: ignore[attr-defined] # see `add_param_group`
        finally:
            self.param_groups = everything
        for p in updated:
            if p in before:
                self.state[p][EMA] = before[p]
            self.state[p][EMA].lerp_(p.detach(), 1 - self.ema_decay)
        return loss


class Engine:
    """One rank's model under ZeRO, with AdamW over named parameter groups.

    Args:
        model: on the CPU in fp32, the same on every rank; moved to `device` and cast as the settings say.
        groups: which parameters have one learning rate; see `optim.parameter_groups`.
        accumulation: micro-batches of one optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParameterGroup],
        training: TrainingSettings,
        optim: OptimSettings,
        accumulation: int,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed(device)
        supported = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
        if EngineAdamW not in supported:  # else DeepSpeed warns of it
            supported.append(EngineAdamW)
        self._gathered = deepspeed.zero.GatheredParameters
        self._tensors = deepspeed.utils
        self.stage = training.zero_stage
        self.groups, self.lr = groups, optim.lr
        self.input_dtype = DTYPES[training.precision]
        self.device = device
        exact = {n: p.detach().clone() for n, p in model.named_parameters()} if training.precision != "fp32" else {}
        self._parameters = parameters = dict(model.to(device).named_parameters())
        self._skips = optim.max_skipped_steps > 0
        self._looks = self._skips or training.precision != "bf16"  # at the norm of each step, for which the host waits
        self._updates = [0] * len(groups)  # of each group, by AdamW: fewer than steps where some are left out
        self._frozen = [False] * len(groups)
        optimizer = EngineAdamW(
            [
                {
                    "params": aligned([parameters[n] for n in g.names]),
                    "weight_decay": g.weight_decay,
                    "lr": g.lr_factor * optim.lr,
                }
                for g in groups
            ],
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            # On the host one pass over a partition: a tenth of the time on idle cores, half beside a step of swin_t.
            fused=device.type == "cpu" or training.offload or None,
        )
        optimizer._step_supports_amp_scaling = False  # of the fused one, which would leave steps out unseen
        optimizer.ema_decay = training.ema_decay
        self._moments = (*MOMENTS, EMA) if training.ema_decay else MOMENTS
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(training, optim, accumulation, device),
            dist_init_required=False,
        )
        self._scaler = self._loss_scaler() if training.precision == "fp16" else None
        self.outcome = Outcome()
        if exact:  # the fp32 master weights were made from weights already rounded
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
        """Add the gradient of one micro-batch's mean loss; DeepSpeed divides by the accumulation.

        Where steps may be skipped, a loss that is not finite leaves no gradient finite: an infinite one may.
        """
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan) if self._skips else loss)

    def step(self) -> None:
        """After each micro-batch; steps the optimizer after the last of an accumulation.

        ZeRO leaves out the update of a gradient that is not finite: stage 3 always, 1 and 2 in bf16 where it is told to
        check. Stage 0 does not by itself. In stages 1 and 2 in bf16, where nothing may be left out and no state is on the
        host, the host waits for nothing.
        """
        last: bool = self.engine.is_gradient_accumulation_boundary()
        scale = self.loss_scale if last else 1.0
        if self.stage == 0 and last:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            self.engine._global_grad_norm = norm / scale if self._scaler else norm
            if self._skips or self._scaler:
                self.optimizer.overflow = not bool(norm.isfinite())
        with nullcontext() if self._looks else without_a_look_at_the_norm():
            self.engine.step()
        if last:
            frozen = self._frozen
            self._freeze([False] * len(self.groups))  # what reads and writes the state finds all parameters alike
            applied = bool(self.engine.was_step_applied())
            self.outcome = Outcome(applied, bool(self._scaler) and not applied and scale > MIN_LOSS_SCALE, scale)
            if applied:
                self._updates = [n + (not off) for n, off in zip(self._updates, frozen, strict=True)]

    # --- the loss scale of fp16 ---------------------------------------------------------------------------------

    def _loss_scaler(self) -> Any:
        """Return what finds the loss scale: PyTorch's in stage 0, else DeepSpeed's."""
        if self.stage == 0:
            return self.engine.torch_autocast_z0_gradscaler
        self.optimizer.loss_scaler.raise_error_at_min_scale = False  # `skipped_steps` does, and says of which batch
        return self.optimizer.loss_scaler

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by, 1 but in fp16; the host waits for the device there."""
        if self._scaler is None:
            return 1.0
        return float(self._scaler.get_scale() if self.stage == 0 else self._scaler.cur_scale)

    def loss_scale_state(self) -> dict[str, float]:
        """Return the scale and the steps since an overflow, in the same form for all stages; nothing but in fp16."""
        if self._scaler is None:
            return {}
        if self.stage == 0:
            return {"scale": self.loss_scale, "stable": self._scaler.state_dict()["_growth_tracker"]}
        return {"scale": self.loss_scale, "stable": self._scaler.cur_iter - self._scaler.last_overflow_iter - 1}

    def load_loss_scale(self, state: Mapping[str, float]) -> None:
        """Go on from a `loss_scale_state`; from the start where it says nothing."""
        if self._scaler is None or not state:
            return
        scale, stable = state["scale"], int(state["stable"])
        if self.stage == 0:
            tracker = {"scale": scale, "_growth_tracker": stable % GROWTH_INTERVAL}
            self._scaler.load_state_dict(self._scaler.state_dict() | tracker)
        else:
            self._scaler.cur_scale, self._scaler.cur_iter, self._scaler.last_overflow_iter = scale, stable, -1

    def set_learning_rate(self, factor: float, epoch: int = 0) -> list[float]:
        """Begin a step of `epoch`: give every group its rate times `factor`, and 0 while it is frozen; returns the rates."""
        self._freeze([epoch < g.frozen_epochs for g in self.groups])
        rates = [0.0 if off else g.lr_factor * self.lr * factor for g, off in zip(self.groups, self._frozen, strict=True)]
        for target in {id(o): o for o in (self.optimizer, self._base_optimizer)}.values():
            for group, rate in zip(target.param_groups, rates, strict=True):
                group["lr"] = rate
        return rates

    def _freeze(self, frozen: list[bool]) -> None:
        """Let autograd leave out the groups that are `frozen`; all are trained when DeepSpeed looks which there are."""
        if frozen == self._frozen:
            return
        self._frozen = frozen
        for group, mark, off in zip(self.groups, self._base_optimizer.param_groups, frozen, strict=True):
            mark["frozen"] = off
            for name in group.names:
                self._parameters[name].requires_grad_(not off)

    def gradient_norm(self) -> Tensor:
        """Return the global norm of the last step's gradient, before clipping; on the device, where nothing waits for it."""
        norm = self.engine.get_global_grad_norm()
        if isinstance(norm, Tensor):
            return norm.detach().float().to(self.device)  # with `offload` it is the host's
        return torch.full((), float(norm), device=self.device)

    # --- the portable state -------------------------------------------------------------------------------------

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return base

    def _partitions(self) -> list[tuple[int, Tensor]]:
        """Return the flat fp32 tensors that the base optimizer steps on this rank, each with the number of its group."""
        if self.stage == 3:
            flat = self.optimizer.fp32_partitioned_groups_flat
            return [(self.optimizer.sub_group_to_group_id[i], p) for i, p in enumerate(flat)]
        return [(i, p) for i, group in enumerate(self._base_optimizer.param_groups) for p in group["params"]]

    def _relink(self) -> None:
        """Let stages 1 and 2 find the moments of every group (without, those after the first are missed)."""
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def state(self) -> State:
        """Return what this rank gives to a checkpoint, after at least one step."""
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.module.named_parameters()}
        return State(shapes, self.weights(), list(self.moments()))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 tensor) of every parameter. Collective: all ranks iterate together."""
        held = self.stage == 0 or (self.stage < 3 and self.input_dtype == torch.float32)  # by every rank, in full
        for name, p in self.module.named_parameters():
            yield name, p.detach() if held else self._tensors.safe_get_full_fp32_param(p)

    def group_records(self) -> list[dict[str, Any]]:
        """Return the groups as a checkpoint keeps them, each with the number of its updates."""
        return [g.as_record() | {"updates": n} for g, n in zip(self.groups, self._updates, strict=True)]

    def moments(self) -> Iterator[Part]:
        """Yield this rank's part of "exp_avg.NAME", "exp_avg_sq.NAME" and "ema.NAME"; each value is with one rank."""
        self._relink()
        mine = self._names_updated() & (self._mine_of_stage_0() if self.stage == 0 else set(self._parameters))
        for name, p in self.module.named_parameters():
            shape = tuple(getattr(p, "ds_shape", p.shape))
            for moment in self._moments if name in mine else ():
                start, values = self._moment(p, moment)
                if values.numel():
                    yield Part(f"{moment}.{name}", shape, start, values)

    def _moment(self, p: Any, moment: str) -> tuple[int, Tensor]:
        """Return this rank's part of a moment of `p`: where it begins in the flattened tensor, and its values."""
        if self.stage == 0:
            return 0, self._base_optimizer.state[p][moment].reshape(-1)
        if self.stage == 3:
            values = self._tensors.safe_get_local_optimizer_state(p, moment)
            start = min(torch.distributed.get_rank() * values.numel(), p.ds_numel)
            return start, values[: p.ds_numel - start]  # padding stands behind
        if p._hp_mapping is None:
            return 0, torch.empty(0)
        return p._hp_mapping.lp_fragment_address.start, p._hp_mapping.get_hp_fragment(moment)

    def _mine_of_stage_0(self) -> set[str]:
        """Choose the parameters whose moments this rank writes, where every rank holds all; the main one has the weights."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        sizes = {n: p.numel() for n, p in self.module.named_parameters()}
        main = max(0.0, 3 / ranks - 1) / 2  # of the moments, which are twice the weights
        before, found = 0, set()
        for name, size in sizes.items():
            at = before / sum(sizes.values())
            before += size
            if rank == (0 if at < main else 1 + int((at - main) / (1 - main) * (ranks - 1))):
                found.add(name)
        return found

    def _names_updated(self) -> set[str]:
        return {name for g, n in zip(self.groups, self._updates, strict=True) if n for name in g.names}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set every parameter, in the model's precision and in the fp32 master copy. Collective for stage 3."""
        for name, p in self.module.named_parameters():
            value = weights[name].to(self.device)
            self._put(p, value)
            if self.stage == 3:
                self._tensors.safe_set_local_fp32_param(p, self._local_slice(p, value))
            elif self.stage:
                self._tensors.safe_set_full_fp32_param(p, value.float())

    def _put(self, p: Any, value: Tensor) -> None:
        """Set a parameter in the model's precision. Collective for stage 3."""
        if self.stage == 3:
            with self._gathered([p], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    p.data.copy_(value)
        else:
            p.data.copy_(value)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Set AdamW's moments and its counts of updates (of the bias correction), after `step` steps.

        Args:
            groups: the `group_records` of then; a group without a count was updated in every step.
        """
        counts = {record["label"]: record.get("updates", step) for record in groups}
        self._updates = [counts.get(g.label, step) for g in self.groups]
        for group, flat in self._partitions():
            if updates := self._updates[group]:
                self._base_optimizer.state[flat] = {
                    "step": torch.tensor(float(updates)),
                    **{m: torch.zeros_like(flat) for m in self._moments},
                }
        self._relink()
        updated = self._names_updated()
        for name, p in self.module.named_parameters():
            for moment in self._moments if name in updated else ():
                value = moments[f"{moment}.{name}"].to(self.device)
                if self.stage == 0:
                    self._base_optimizer.state[p][moment].copy_(value)
                elif self.stage == 3:
                    self._tensors.safe_set_local_optimizer_state(p, self._local_slice(p, value), moment)
                else:
                    self._tensors.safe_set_full_optimizer_state(p, value, moment)
        self.engine.global_steps = step

    def _local_slice(self, p: Any, value: Tensor) -> Tensor:
        """Cut this rank's part of a full tensor in stage 3: padded to the partitions' size, then cut."""
        size = p.ds_tensor.ds_numel if hasattr(p.ds_tensor, "ds_numel") else p.ds_tensor.numel()
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        flat = torch.zeros(size * world_size, dtype=torch.float32, device=value.device)
        flat[: value.numel()] = value.flatten().float()
        return flat[rank * size : (rank + 1) * size]

    @torch.no_grad()
    def _exchange(self) -> None:
        """Let weights and averaged weights change places, in the model too; twice is exact. Collective."""
        for _, flat in self._partitions():
            average = self._base_optimizer.state[flat].get(EMA)
            if average is not None:  # else it was never updated
                weights = flat.detach().clone()
                flat.copy_(average)
                average.copy_(weights)
        if self.stage:
            for p in self.module.parameters():
                self._put(p, self._tensors.safe_get_full_fp32_param(p))

    @contextmanager
    def full_module(self, averaged: bool = False) -> Iterator[nn.Module]:
        """Lend the module for evaluation, on clips of `input_dtype`; stage 3 gathers each layer as it runs.

        With `averaged` it has the averaged weights (`training.ema_decay`), until it is given back.

        Stage 0 in bf16 and fp16 keeps fp32 weights: as in `forward`, where DeepSpeed sees to it, it runs under autocast.
        """
        was_training = self.module.training
        self.module.eval()
        if averaged:
            self._exchange()
        mixed = self.stage == 0 and self.input_dtype != torch.float32
        try:
            with torch.autocast(self.device.type, self.input_dtype if mixed else torch.bfloat16, enabled=mixed):
                yield self.module
            if averaged:  # not after an error of this rank alone: the others would wait in it, and the error be hidden
                self._exchange()
        finally:
            self.module.train(was_training)
