"""The paper's ablations: a row of a table is a base recipe with what the row changes in it."""

from __future__ import annotations

from dataclasses import dataclass

TABLES = {
    4: "design of the attention",
    5: "temporal dimension of the tokens and of the window",
    6: "shift of the windows",
    7: "learning rate of the backbone / the head's",
    8: "2D patch embedding at the start",
    9: "2D bias tables at the start",
}


@dataclass(frozen=True)
class Row:
    """A row of a table, and what the paper reports: percentages at 4 clips x 3 crops, 10^9 MACs, 10^6 parameters."""

    table: int
    label: str
    base: str  # a recipe
    overrides: tuple[str, ...]  # all that it changes
    top1: float
    top5: float
    gmacs: float | None = None  # None: not reported
    mparams: float | None = None
    gib: float = 15  # activations of a rank, counted on meta tensors
    note: str = ""

    @property
    def recipe(self) -> str:
        """The name that `load_settings` knows the row by."""
        return f"ablation_table{self.table}_{self.label}"


T, B, B_22K = "k400_swin_t", "k400_swin_b", "k400_swin_b_22k"
DESIGN = "No code of this design was published; the model follows the paper's words and meets its counts."
TOKENS = (
    "The paper gives tokens, not frames: here the patch stays at 2 frames and the clip at a span of 64 (frames x stride), "
    "so that only the temporal resolution changes. The counts agree; another stride would give the same ones."
)
INFLATION = "Start from the 2D weights themselves: a model that was inflated before keeps the inflation it was given."
MAIN_TABLE = "The paper's table 7 has 82.6 / 95.7 where its main table has 82.7 / 95.5 for the same recipe."
WINDOW_4 = "model.window_size=[4, 7, 7]"

ROWS = (
    # table, label, base, changes, top-1, top-5, GMACs, M parameters
    Row(4, "joint", T, (), 78.8, 93.6, 88, 28.2),
    Row(4, "split", T, ("model.attention_design=split",), 76.4, 92.1, 83, 42.0, gib=8.3, note=DESIGN),
    Row(4, "factorized", T, ("model.attention_design=factorized",), 78.5, 93.5, 95, 36.5, gib=11, note=DESIGN),
    Row(5, "dim16_window16", T, ("model.window_size=[16, 7, 7]",), 79.1, 93.8, 106, 28.5, gib=24),
    Row(5, "dim8_window8", T, ("data.frames=16", "data.stride=4"), 78.5, 93.2, 44, gib=7.6, note=TOKENS),
    Row(5, "dim4_window4", T, ("data.frames=8", "data.stride=8", WINDOW_4), 76.7, 92.5, 20, gib=2.8, note=TOKENS),
    Row(5, "dim16_window8", T, (), 78.8, 93.6, 88),
    Row(5, "dim16_window4", T, (WINDOW_4,), 78.6, 93.4, 79, gib=11),
    Row(6, "3d", T, (), 78.8, 93.6),
    Row(6, "spatial", T, ("model.shift=spatial",), 78.5, 93.5),
    Row(6, "none", T, ("model.shift=none",), 78.1, 93.3),
    Row(7, "1k_ratio01", B, (), 80.6, 94.6, gib=33),
    Row(7, "1k_ratio1", B, ("optim.backbone_ratio=1.0",), 80.2, 94.2, gib=33),
    Row(7, "22k_ratio01", B_22K, (), 82.6, 95.7, gib=33, note=MAIN_TABLE),
    Row(7, "22k_ratio1", B_22K, ("optim.backbone_ratio=1.0",), 82.0, 95.3, gib=33),
    Row(8, "inflate", T, (), 78.8, 93.6, note=INFLATION),
    Row(8, "centre", T, ("model.inflate_embedding=centre",), 78.8, 93.7, note=INFLATION),
    Row(9, "duplicate", T, (), 78.8, 93.6, note=INFLATION),
    Row(9, "centre", T, ("model.inflate_bias=centre",), 78.8, 93.6, note=INFLATION),
)


def row_text(row: Row, base: str) -> str:
    """Write a row as a recipe: the text `base` of its base recipe with the row's overrides in their place."""
    lines = base.splitlines()
    changes = dict(o.split("=", 1) for o in (f"run.name={row.recipe}", *row.overrides))
    kept = [line for line in lines if not line.startswith("#") and line.partition(":")[0] not in changes]
    counts = [f"{row.gmacs} G MACs"] * bool(row.gmacs) + [f"{row.mparams} M parameters"] * bool(row.mparams)
    header = [
        lines[0].removeprefix("# ").replace(f"--recipe {row.base} ", f"--recipe {row.recipe} "),
        f"{row.base} with {', '.join(row.overrides) or 'nothing changed'}.",
        f"Table {row.table}, {TABLES[row.table]}: {row.label}. Published (top-1 / top-5): {row.top1} / {row.top5}"
        f"{''.join(f', {c}' for c in counts)} at 4 clips x 3 crops. Not run here.",
        f"All rows of the table: python jobs/ablate.py --table {row.table}",
        f"8 GPUs of 80 GB, bf16, micro-batch 8: {row.gib:g} GiB of activations on each, counted on meta tensors without "
        "fused attention; memory and speed on a GPU were not measured.",
        *([row.note] if row.note else []),
    ]
    return "\n".join([*(f"# {line}" for line in header), *(f"{k}: {v}" for k, v in changes.items()), *kept, ""])
