"""Copies of shards with damage of a chosen kind."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vswin_dist.manifest import Manifest, read_manifest, write_manifest


def with_bad_videos(source: Path, target: Path, numbers: Iterable[int]) -> Manifest:
    """A whole set in which the videos `numbers` do not decode, as if they had been packed like that."""
    shutil.copytree(source, target)
    manifest = read_manifest(str(target))
    for number in numbers:
        sample = manifest.samples[number]
        path = target / manifest.shards[sample.shard].url
        data = bytearray(path.read_bytes())
        data[sample.offset:sample.offset + sample.size] = bytes(sample.size)
        path.write_bytes(data)
        manifest.samples[number] = replace(sample, crc32=zlib.crc32(bytes(sample.size)))
    for number, shard in enumerate(manifest.shards):
        content = (target / shard.url).read_bytes()
        manifest.shards[number] = replace(shard, sha256=hashlib.sha256(content).hexdigest())
    write_manifest(manifest, str(target))
    return manifest


def with_damaged_storage(source: Path, target: Path, number: int) -> Manifest:
    """A set whose storage has flipped a byte of the video `number`: its manifest is the true one."""
    shutil.copytree(source, target)
    manifest = read_manifest(str(target))
    sample = manifest.samples[number]
    path = target / manifest.shards[sample.shard].url
    data = bytearray(path.read_bytes())
    data[sample.offset + sample.size // 2] ^= 0xFF
    path.write_bytes(data)
    return manifest
