"""The settings of a preparation: how a video is checked and encoded, and how shards are cut."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from vswin_dist.errors import ConfigError, nearest
from vswin_dist.manifest import COLOURS

PROFILES = ("train", "archive", "copy")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Parse a number of bytes from `256MB`, `64 MiB`, `1.5G` or a plain number.

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?|)B?\s*", text.upper())
    if not found or float(found[1]) * _UNITS[found[2]] < 1:
        raise ConfigError(f"{text!r} is not a size; write for instance 256MB, 64MiB or 1.5G")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Encoding:
    """What is asked of a video and what is made of it. Part of the manifest and of its fingerprint.

    `train`: h264 at a short side of `short_side` pixels (never scaled up), a key frame every `keyframe_interval`
    frames, no audio, settings that decode fast. `archive`: the same at the video's own size.
    `copy`: the bytes as they are. All three decode every video completely first.
    """

    profile: str = "train"
    short_side: int = 256  # pixels; train only
    keyframe_interval: int = 16  # frames; train and archive
    crf: int = 23  # x264's constant quality, lower is better; train and archive
    preset: str = "veryfast"  # x264's effort; train and archive
    max_fps: float = 0.0  # frames per second, 0 for no cap; train and archive
    min_frames: int = 2  # fewer is too_short
    min_side: int = 16  # pixels of the short side; less is too_small
    max_bad: float = 0.05  # fraction of frames lost or damaged that is let pass

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigError(
                f"unknown profile {self.profile!r}: one of {', '.join(PROFILES)}.{nearest(self.profile, PROFILES)}"
            )
        for name, low, high in (
            ("short_side", 16, 8192),
            ("keyframe_interval", 1, 10_000),
            ("crf", 0, 51),
            ("max_fps", 0, 1000),
            ("min_frames", 1, 10**6),
            ("min_side", 2, 8192),
            ("max_bad", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, not {value}")

    @property
    def transcodes(self) -> bool:
        """Whether the bytes are made anew."""
        return self.profile != "copy"

    def record(self) -> dict[str, Any]:
        """Describe the encoding for the manifest: the settings that take part in this profile, and the encoder."""
        everything = asdict(self)
        names = ["profile", "min_frames", "min_side", "max_bad"]
        if self.profile == "train":
            names.append("short_side")
        if self.transcodes:
            names += ["keyframe_interval", "crf", "preset", "max_fps"]
        chosen = {name: everything[name] for name in names}
        if self.transcodes:
            import av

            version = ".".join(str(n) for n in av.library_versions["libavcodec"])
            chosen |= {"codec": "libx264", "tune": "fastdecode", "pixel_format": "yuv420p", "libavcodec": version}
            chosen["colours"] = COLOURS  # they decide the bytes here, not those of `copy`
        return dict(sorted(chosen.items()))


@dataclass(frozen=True)
class PrepSettings:
    """All that decides the bytes of a dataset, given its source. The workers and the folders are no part of it."""

    encoding: Encoding = field(default_factory=Encoding)
    shard_bytes: int = 256 * 10**6  # target bytes of a tar; a larger single video makes a larger tar
    shard_count: int = 10_000  # samples in a tar at most
    seed: int = 0  # of the order of the samples
    window: int = 2000  # videos of an archive that are shuffled together; files are shuffled over the whole set
    keep_duplicates: bool = False  # keep videos whose bytes were seen before
    name: str = "dataset"
    split: str = "train"
    sampling: str = "dense"  # how clips are to be taken in training; see the manifest

    def __post_init__(self) -> None:
        if self.shard_bytes < 10_000:
            raise ConfigError(f"shard size must be at least 10 kB, not {self.shard_bytes} bytes")
        for name, value in (("shard count", self.shard_count), ("window", self.window)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    def record(self) -> dict[str, Any]:
        """Describe for the journal what two runs into one output must have in common, as plain JSON."""
        return {**asdict(self), "encoding": self.encoding.record()}


def settings_of(record: dict[str, Any]) -> PrepSettings:
    """Make the settings that `PrepSettings.record` described."""
    names = Encoding.__dataclass_fields__
    encoding = Encoding(**{k: v for k, v in record["encoding"].items() if k in names})
    return PrepSettings(**{**record, "encoding": encoding})
