"""What GPUs and links can do, as their makers state it, and what this project was measured to make of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
# TFLOP/s of dense bf16 products by NVIDIA's data sheets, by a word of the device's name; the first that fits.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,  # SXM
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "L40S": 362,
    "L4": 121,
}


def peak_flops(name: str) -> float:
    """Return the bf16 FLOP/s that the device `name` could do at most; 0 where it is not known."""
    return 1e12 * next((peak for word, peak in PEAKS.items() if re.search(rf"\b{word}\b", name)), 0)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory and dense bf16 rate by its data sheet, and its link to the others of its node."""

    memory: int  # bytes that a process may use
    peak: float  # dense bf16 operations a second
    link: float  # bytes a second to the other GPUs of its node, in one direction
    source: str


GPUS = {
    "a100-40": Gpu(39 * GIB, peak_flops("A100"), 300e9, "NVIDIA A100 data sheet, NVLink of 600 GB/s both ways"),
    "a100-80": Gpu(79 * GIB, peak_flops("A100"), 300e9, "NVIDIA A100 data sheet, NVLink of 600 GB/s both ways"),
    "h100-80": Gpu(79 * GIB, peak_flops("H100"), 450e9, "NVIDIA H100 SXM data sheet, NVLink of 900 GB/s both ways"),
    "h200-141": Gpu(140 * GIB, peak_flops("H200"), 450e9, "NVIDIA H200 SXM data sheet, NVLink of 900 GB/s both ways"),
    "b200-180": Gpu(178 * GIB, peak_flops("B200"), 900e9, "NVIDIA HGX B200 data sheet, NVLink of 1,800 GB/s both ways"),
    "l40s-48": Gpu(44 * GIB, peak_flops("L40S"), 32e9, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
}


@dataclass(frozen=True)
class Coefficients:
    """What the prediction takes for granted. `SOURCES` says where each is from."""

    share: float = 0.25  # of the peak, by the products of forward and backward of swin_l, whose first stage has 192 channels
    narrow: float = 1.3  # a narrower model's share: times the power of its width, of 192
    block_s: float = 3.6e-3  # least time of a block forward and backward: the host starts kernels no faster
    network: float = 50e9  # bytes a second of each GPU's network interface, in one direction
    hop_s: float = 15e-6  # latency of one step of a collective between nodes
    copy: float = 25e9  # bytes a second from a GPU to the host's memory
    decode_s: float = 0.0104  # of one core for a clip
    clip_bytes: float = 0.5e6  # of a sample in its shard
    gpus_per_node: int = 8


SOURCES = {
    "share": "measured: swin_l, 8 clips of 32 x 224 x 224 in 117 ms on one H200 (docs/benchmarks.md)",
    "narrow": "measured: of the peak, swin_t has 0.10 and swin_b 0.14 to 0.17 on one H200, with 8 and 16 clips",
    "block_s": "measured: swin_t, 8 clips in 43 ms on one H200, 12 blocks",
    "network": "assumed: 400 Gbit/s for each GPU (InfiniBand NDR, or 3.2 Tbit/s of EFA for a node of 8)",
    "hop_s": "assumed: usual figure of NCCL over InfiniBand; EFA is nearer to 30 us",
    "copy": "assumed: half of PCIe 5.0 x16",
    "decode_s": "measured: 32 frames of a train shard, YUV, on one core of the machine of docs/benchmarks.md",
    "clip_bytes": "assumed: ten seconds, short side of 256; a manifest's own mean is taken where data.train is given",
    "gpus_per_node": "assumed",
}
