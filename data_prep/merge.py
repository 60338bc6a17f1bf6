"""One manifest over the shards of several datasets; no shard is moved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vswin_dist import storage
from vswin_dist.columns import Builder, Table
from vswin_dist.errors import ConfigError, DataError
from vswin_dist.manifest import (
    FILE_NAME,
    Manifest,
    Reject,
    Sample,
    Shard,
    check_same_classes,
    manifest_url,
    read_manifest,
    shard_url,
    write_manifest,
)


def merge(out: str, urls: list[str], name: str, split: str) -> Manifest:
    """Join the datasets at `urls` into a manifest at `out`; shards below `out` are named relative to it.

    Raises:
        DataError: classes, encoding, sampling or version of colours differ, a video is in two of them, or `out` holds
            another manifest.
    """
    if len(urls) < 2:
        raise ConfigError("merge needs two datasets at least")
    manifests = [read_manifest(url) for url in urls]
    first = manifests[0]
    for url, other in zip(urls[1:], manifests[1:], strict=True):
        check_same_classes(first.classes, other.classes, url)
        if other.sampling != first.sampling:
            raise DataError(
                f"{url} is to be sampled {other.sampling}, {urls[0]} {first.sampling}: shard one of them again "
                f"with --sampling {first.sampling} or {other.sampling}"
            )
        if other.colours != first.colours:
            raise DataError(
                f"{url} and {urls[0]} are of versions that keep colours differently ({other.colours} and {first.colours}): "
                "shard the older one again"
            )
        if other.encoding != first.encoding:
            changed = sorted(k for k in {*first.encoding, *other.encoding} if first.encoding.get(k) != other.encoding.get(k))
            raise DataError(f"{url} was encoded otherwise than {urls[0]}: {', '.join(changed)}")
    folder = manifest_url(storage.absolute(out)).rsplit("/", 1)[0] + "/"
    shards: list[Shard] = []
    samples, rejected = Builder(Sample), Builder(Reject)
    for url, manifest in zip(urls, manifests, strict=True):
        for block in manifest.samples.blocks():
            samples.add(block | {"shard": block["shard"] + np.int32(len(shards))})
        for block in manifest.rejected.blocks():
            rejected.add(block)
        shards += [replace(s, url=shard_url(url, s).removeprefix(folder)) for s in manifest.shards]
    joined = replace(
        first,
        name=name,
        split=split,
        shards=Table.of(Shard, shards),
        samples=samples.table(),
        rejected=rejected.table(),
        read=sum(m.read for m in manifests),
    )
    joined.check(out)
    target = storage.join(storage.absolute(out), FILE_NAME)
    if storage.exists(target) and read_manifest(out).fingerprint != joined.fingerprint:
        raise DataError(f"{out} already holds another dataset")
    write_manifest(joined, out)
    return joined
