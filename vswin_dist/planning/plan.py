"""The capacity plan of a training, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vswin_dist import models
from vswin_dist.choices import GradientCheckpointing
from vswin_dist.config import Settings
from vswin_dist.models.swin.counting import count_macs, count_parameters
from vswin_dist.models.swin.presets import Architecture
from vswin_dist.planning import memory, throughput
from vswin_dist.planning.hardware import GIB, GPUS, SOURCES, Coefficients
from vswin_dist.planning.memory import Setup
from vswin_dist.planning.throughput import Scale, Work
from vswin_dist.training.initial_model import model_overrides

MOST_GPUS = 4096
RECOMPUTED: dict[GradientCheckpointing, float] = {"none": 0.0, "selective": 0.45, "block": 1.0, "stage": 1.0}
# selective: of a block's products, those of attention with its projections, for windows of 392 tokens


@dataclass(frozen=True)
class CapacityPlan:
    """Predictions for one training; everything else follows from its fields."""

    settings: Settings
    gpu: str
    gpus: int
    samples: int  # of an epoch
    architecture: Architecture
    parameters: int
    macs: int
    coefficients: Coefficients

    @classmethod
    def make(cls, s: Settings, gpu: str, gpus: int, samples: int, classes: int, coefficients: Coefficients) -> CapacityPlan:
        """Count the model of `s` and plan for it."""
        with torch.device("meta"):
            model = models.build_model(s.model.name, num_classes=classes, **model_overrides(s))
        clip = (s.data.frames, s.data.size, s.data.size)
        return cls(s, gpu, gpus, samples, model.architecture, count_parameters(model), count_macs(model, clip), coefficients)

    @property
    def work(self) -> Work:
        """What the recipe asks of a GPU."""
        t = self.settings.training
        return Work(
            macs=self.macs,
            blocks=sum(self.architecture.depths),
            width=self.architecture.embed_dim,
            parameters=self.parameters,
            element=2 if t.precision != "fp32" and t.zero_stage else 4,
            recomputed=RECOMPUTED[self.architecture.gradient_checkpointing],
            micro_batch=t.micro_batch,
            zero_stage=t.zero_stage,
        )

    @property
    def sizes(self) -> list[int]:
        """Numbers of GPUs to compare: powers of two, and the one that is asked for."""
        return sorted({self.gpus, *(1 << n for n in range(MOST_GPUS.bit_length()) if 1 << n >= min(self.gpus, 8))})

    def fixed(self) -> list[Scale]:
        """Scale with the recipe's global batch, as far as it divides."""
        batch, gpu = self.settings.training.global_batch, GPUS[self.gpu]
        found = (throughput.at_fixed_batch(self.work, batch, n, gpu, self.coefficients) for n in self.sizes)
        return [scale for scale in found if scale]

    def grown(self) -> list[Scale]:
        """Scale with a batch that grows with the GPUs, each with one micro-batch."""
        return [throughput.at_fixed_load(self.work, n, 1, GPUS[self.gpu], self.coefficients) for n in self.sizes]

    def memory_table(self) -> list[str]:
        """Bytes of a GPU by ZeRO stage (rows) and checkpointing (columns), for the recipe's micro-batch."""
        t, d = self.settings.training, self.settings.data
        modes: tuple[GradientCheckpointing, ...] = ("none", "selective", "block", "stage")
        lines = [
            f"Memory of a GPU of {GPUS[self.gpu].memory / GIB:.0f} GiB, micro-batch {t.micro_batch}, {t.precision}, GiB:",
            "| ZeRO stage | " + " | ".join(modes) + " |",
            "|---" * (len(modes) + 1) + "|",
        ]
        for stage in range(4):
            cells = []
            for mode in modes:
                clip = (d.frames, d.size, d.size)
                averages, offloads = t.ema_decay > 0, t.offload and stage > 0
                setup = Setup(clip, t.micro_batch, self.gpus, stage, t.precision, "cuda", averages, offloads)
                found = memory.predict(replace(self.architecture, gradient_checkpointing=mode), setup).total
                chosen = stage == t.zero_stage and mode == self.architecture.gradient_checkpointing
                text = f"{found / GIB:.1f}" + ("" if found <= GPUS[self.gpu].memory else " (too much)")
                cells.append(f"**{text}**" if chosen else text)
            lines.append(f"| {stage} | " + " | ".join(cells) + " |")
        return lines

    def row(self, scale: Scale, batch_grows: bool) -> str:
        """One line of a scaling table."""
        t, c, step = self.settings.training, self.coefficients, scale.step
        clips = t.epochs * self.samples * self.settings.data.repeats
        seconds = min(clips, (t.max_steps or clips) * scale.global_batch) / scale.clips_per_second
        cells = [
            f"{scale.gpus:,}",
            f"{scale.global_batch:,}",
            f"{scale.accumulation}",
            f"{step.compute * 1e3:.0f}",
            f"{step.communication * 1e3:.1f}",
            f"{step.optimizer * 1e3:.1f}",
            f"{scale.clips_per_second:,.0f}",
            f"{2 * 3 * self.macs * scale.clips_per_second / scale.gpus / GPUS[self.gpu].peak:.0%}",
            f"{scale.clips_per_second * c.decode_s / scale.gpus:.1f}",
            f"{scale.clips_per_second * c.clip_bytes / 1e9:.2f}",
            f"{seconds / 3600:,.1f}",
            f"{seconds / 3600 * scale.gpus:,.0f}",
        ]
        marked = scale.gpus == self.gpus and (not batch_grows or not any(f.gpus == self.gpus for f in self.fixed()))
        return "| " + " | ".join(f"**{x}**" if marked else x for x in cells) + " |"

    def scaling_table(self, scales: list[Scale], batch_grows: bool) -> list[str]:
        """Lines of a table, a row for each number of GPUs."""
        head = (
            "| GPUs | batch | accumulation | compute ms | communication ms | update ms | clips/s | MFU | "
            "decode cores a GPU | storage GB/s | hours | GPU-hours |"
        )
        return [head, "|---" * 12 + "|", *(self.row(scale, batch_grows) for scale in scales)]

    def __str__(self) -> str:
        s, c = self.settings, self.coefficients
        t, d = s.training, s.data
        fixed, grown = self.fixed(), self.grown()
        saved = 12 * self.parameters
        lines = [
            f"# {s.recipe or s.run.name}: {s.model.name}, {self.parameters / 1e6:.1f} M parameters, "
            f"{self.macs / 1e9:.0f} G multiply-accumulates for a clip of {d.frames} x {d.size} x {d.size}",
            f"{t.epochs} epochs of {self.samples:,} videos on {self.gpu}"
            + (f", at most {t.max_steps:,} steps" if t.max_steps else ""),
            "",
            *self.memory_table(),
            "",
            f"With the recipe's batch of {t.global_batch}:",
            *(self.scaling_table(fixed, False) if fixed else [f"{t.global_batch} does not divide by {self.gpus} GPUs."]),
            "",
            f"With a batch that grows, {t.micro_batch} clips for each GPU:",
            *self.scaling_table(grown, True),
            "",
            *(throughput.limit(fixed, grown, t.global_batch, self.work, GPUS[self.gpu], c) if fixed else []),
            f"A checkpoint holds {saved / 1e9:.1f} GB; copying it to the hosts takes at least {saved / c.copy:.2f} s of the "
            f"main rank, sending it to storage at 1 GB/s {saved / 1e9:.0f} s.",
            "",
            "Taken for granted:",
            f"- gpu: {GPUS[self.gpu].peak / 1e12:.0f} TFLOP/s of dense bf16 ({GPUS[self.gpu].source})",
            *(f"- {name} = {getattr(c, name):g}: {source}" for name, source in SOURCES.items()),
        ]
        return "\n".join(lines)

    def draw(self, file: Path) -> None:
        """Draw clips a second over the number of GPUs, with the line of perfect scaling."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        grown, fixed = self.grown(), self.fixed()
        first = grown[0].clips_per_second / grown[0].gpus
        axes.plot([s.gpus for s in grown], [first * s.gpus for s in grown], ":", color="0.6", label="perfect")
        axes.plot([s.gpus for s in grown], [s.clips_per_second for s in grown], "o-", label="batch grows with the GPUs")
        if fixed:
            batch = self.settings.training.global_batch
            axes.plot([s.gpus for s in fixed], [s.clips_per_second for s in fixed], "s-", label=f"batch of {batch}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.set_xlabel(f"GPUs ({self.gpu})")
        axes.set_ylabel("clips a second, predicted")
        axes.set_title(f"{self.settings.recipe or self.settings.run.name}: {self.settings.model.name}")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
        figure.savefig(file, dpi=120)
