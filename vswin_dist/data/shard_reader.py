"""The bytes of samples: by offset from the shards, or from copies of whole shards on the node's disk; read ahead.

A request to object storage takes tens of milliseconds, decoding its answer about as long. Whoever knows which samples
it will need has their bytes on the way while it decodes, within a bound: see `read_ahead`.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from vswin_dist import local_files, storage
from vswin_dist.data.shard_cache import open_cache
from vswin_dist.errors import DataError, StorageError
from vswin_dist.manifest import Manifest, shard_url

T = TypeVar("T")
# Bounds of what one worker process reads ahead of its decoding; the batch being decoded comes on top.
AHEAD_BYTES = 64 << 20
AHEAD_SAMPLES = 64
REQUESTS = 16  # under way at once: 50 ms each let a worker decode 320 samples/s


class Members:
    """The video members of one manifest, as one process reads them; safe to use from several threads.

    Args:
        cache_gb: of whole shards on this node's disk, shared by its processes; 0: none.
    """

    def __init__(self, manifest: Manifest, base: str, cache_gb: float = 0.0) -> None:
        self.manifest, self.base = manifest, base
        self.cache = open_cache(local_files.cache_home(), int(cache_gb * 1e9), manifest.fingerprint) if cache_gb else None

    def read(self, index: int) -> bytes:
        """Read the video of sample `index`, checked by length and crc32; a mismatch is retried as a fault of the transfer.

        Raises:
            DataError: they are gone, or not those that were packed: the shard is damaged, not the video.
            StorageError: the storage fails.
        """
        sample = self.manifest.samples.row(index)
        shard = self.manifest.shards[sample.shard]
        offset, size, crc32 = sample.offset, sample.size, sample.crc32
        url = shard_url(self.base, shard)
        if self.cache:
            data = self.cache.read(shard, offset, size)
            if data is not None and zlib.crc32(data) == crc32:
                return data
            if data is not None:
                self.cache.discard(shard)
            self.cache.want(shard, url)
        try:
            return storage.read_range(url, offset, size, crc32)
        except StorageError as error:
            message = f"sample {sample.key!r} cannot be read: {error}"
            raise StorageError(message, error.retriable, error.errno) from error
        except (DataError, FileNotFoundError) as error:
            raise DataError(
                f"sample {sample.key!r} cannot be read: {error}. Its shard is damaged or gone: "
                f"run data-prep verify --repair {self.base}"
            ) from error

    def close(self) -> None:
        """Stop what runs in the background."""
        if self.cache:
            self.cache.close()


def read_ahead(
    batches: Iterator[list[T]], read: Callable[[T], bytes], size: Callable[[T], int]
) -> Iterator[list[tuple[T, Future[bytes]]]]:
    """Give each batch with its items' bytes under way, in order, later batches being read meanwhile.

    Whole batches are asked for until AHEAD_BYTES or AHEAD_SAMPLES is reached.

    Args:
        size: the number of bytes that `read` will give.
    """
    waiting: deque[list[tuple[T, Future[bytes]]]] = deque()
    held_bytes = held = 0
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="fetch")
    try:
        for batch in batches:
            waiting.append([(item, pool.submit(read, item)) for item in batch])
            held_bytes, held = held_bytes + sum(map(size, batch)), held + len(batch)
            while waiting and (held_bytes >= AHEAD_BYTES or held >= AHEAD_SAMPLES):
                ready = waiting.popleft()
                held_bytes, held = held_bytes - sum(size(i) for i, _ in ready), held - len(ready)
                yield ready
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
