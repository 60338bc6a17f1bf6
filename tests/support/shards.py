"""Copies of shards with damage of a chosen kind."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path

from vswin_dist.manifest import Manifest, Sample, read_manifest, write_manifest


def with_corrupt_videos(source: Path, target: Path, indices: Iterable[int]) -> Manifest:
    """Copy a set, with videos `indices` that do not decode, as if they had been packed like that."""
    shutil.copytree(source, target)
    manifest = read_manifest(str(target))
    samples = list(manifest.samples)
    for index in indices:
        sample = samples[index]
        path = target / manifest.shards[sample.shard].url
        data = bytearray(path.read_bytes())
        data[sample.offset : sample.offset + sample.size] = bytes(sample.size)
        path.write_bytes(data)
        samples[index] = replace(sample, crc32=zlib.crc32(bytes(sample.size)))
    shards = [replace(s, sha256=hashlib.sha256((target / s.url).read_bytes()).hexdigest()) for s in manifest.shards]
    changed = replace(manifest, shards=shards, samples=samples)
    write_manifest(changed, str(target))
    return changed


def with_damaged_storage(source: Path, target: Path, index: int) -> Manifest:
    """Copy a set, a byte of the video `index` flipped by the storage: the manifest is the true one."""
    shutil.copytree(source, target)
    manifest = read_manifest(str(target))
    sample = manifest.samples[index]
    path = target / manifest.shards[sample.shard].url
    data = bytearray(path.read_bytes())
    data[sample.offset + sample.size // 2] ^= 0xFF
    path.write_bytes(data)
    return manifest


def with_a_hollow_video(source: Path, target: Path, index: int) -> Sample:
    """Copy a set, with a manifest of version 1 that says 0 frames of the video `index`; returns that sample as it was."""
    shutil.copytree(source, target)
    manifest = read_manifest(str(target))
    columns = {f.name: [getattr(s, f.name) for s in manifest.samples] for f in fields(Sample)}
    columns["frames"][index] = 0
    body = {
        "format": "vswin-manifest",
        "version": 1,
        **{
            name: getattr(manifest, name)
            for name in ("name", "split", "fingerprint", "counts", "encoding", "classes", "sampling")
        },
        "shards": [asdict(s) for s in manifest.shards],
        "rejected": [asdict(r) for r in manifest.rejected],
        "samples": columns,
    }
    (target / "manifest.json").write_text(json.dumps(body))
    return manifest.samples[index]
