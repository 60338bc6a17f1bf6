"""The report card of the recipes: what was published, what is expected, what was measured here, and what was not run."""

from __future__ import annotations

from dataclasses import dataclass

from vswin_dist.config.ablations import ROWS

NOT_RUN = "not run"
STEPS = "steps alone, on one H200"  # docs/benchmarks.md
SAME = "as published"


@dataclass(frozen=True)
class Entry:
    """One recipe. Scores are top-1 / top-5 in percent, at 4 clips x 3 crops where nothing else is said."""

    recipe: str
    trains: str  # model and data
    published: str
    expected: str = SAME
    measured: str = NOT_RUN


ENTRIES = (
    Entry("k400_swin_t", "Swin-T, Kinetics-400", "78.8 / 93.6", measured=STEPS),
    Entry("k400_swin_s", "Swin-S, Kinetics-400", "80.6 / 94.5"),
    Entry("k400_swin_b", "Swin-B, Kinetics-400", "80.6 / 94.6"),
    Entry("k400_swin_b_22k", "Swin-B of ImageNet-22K, Kinetics-400", "82.7 / 95.5"),
    Entry("k400_swin_l", "Swin-L, Kinetics-400", "83.1 / 95.9", measured=STEPS),
    Entry("k400_swin_l_384", "Swin-L at 384, Kinetics-400", "84.6 / 96.5; 10 x 5 views 84.9 / 96.7"),
    Entry("k600_swin_b", "Swin-B, Kinetics-600", "84.0 / 96.5"),
    Entry("k600_swin_l_384", "Swin-L at 384, Kinetics-600", "85.9 / 97.1; 10 x 5 views 86.1 / 97.3"),
    Entry("ssv2_swin_b", "Swin-B, Something-Something V2", "69.6 / 92.7 at 1 x 3 views", measured=STEPS),
    Entry("finetune", "Swin-T, your videos", "none", "as the videos are", STEPS),
    Entry("demo", "swin_nano, six motions", "none", "top-1 of 90 or more", "top-1 of 99.0, 96.7, 99.3 (seeds 0, 1, 2)"),
)


def entries() -> list[Entry]:
    """List all recipes, the rows of the paper's ablations last."""
    rows = (Entry(r.recipe, f"{r.base} with {', '.join(r.overrides) or 'no change'}", f"{r.top1} / {r.top5}") for r in ROWS)
    return [*ENTRIES, *rows]


def card(entries: list[Entry]) -> str:
    """Write `entries` as a Markdown table."""
    lines = ["| recipe | trains | published | expected | measured here |", "|---|---|---|---|---|"]
    lines += [f"| `{e.recipe}` | {e.trains} | {e.published} | {e.expected} | {e.measured} |" for e in entries]
    return "\n".join(lines)
