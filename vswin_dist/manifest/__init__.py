"""The shard manifest: the contract between data_prep, which writes it, and training, which reads by it.

`manifest.json` beside the shards is a small head. It names two Parquet files beside it, with their sha256: the samples, and
what was rejected. A node converts them once to a file that all its processes map (`node_cache`), and a manifest that goes to
another process is a reference to that file: a million samples cost a process 0.2 MB. Manifests of version 1 hold
everything in the JSON, and are converted in the same way.

Shard URLs are relative to the manifest unless absolute. The fingerprint names the content (shard names, hashes, samples,
classes, encoding) and holds no place and no time: the same set on disk and on S3 has the same one.
"""

from vswin_dist.manifest.contents import (
    COLOURS,
    FILE_NAME,
    SAMPLINGS,
    Manifest,
    Reject,
    Sample,
    Shard,
    check_same_classes,
    check_shard_sizes,
    manifest_url,
    nfc,
    shard_url,
)
from vswin_dist.manifest.files import read_manifest, write_manifest

__all__ = [
    "COLOURS",
    "FILE_NAME",
    "SAMPLINGS",
    "Manifest",
    "Reject",
    "Sample",
    "Shard",
    "check_same_classes",
    "check_shard_sizes",
    "manifest_url",
    "nfc",
    "read_manifest",
    "shard_url",
    "write_manifest",
]
