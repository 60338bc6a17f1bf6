"""Videos as those who ask give them: by a path or a URL, or what stands in the file, as bytes or as base64."""

from __future__ import annotations

import base64

from vswin_dist import storage
from vswin_dist.errors import DataError

LONGEST_PATH = 4096  # characters; a longer text is base64
CONTENT = "the video"  # what an error calls one that has no name


def name_of(video: object) -> str | None:
    """Give the path or URL of a video, None of one that is given as what stands in the file."""
    return video if isinstance(video, str) and not _is_base64(video) else None


def read_video(video: object) -> bytes:
    """Read a video: a path or URL, base64 (alone, or as `data:video/mp4;base64,...`), or its bytes.

    Raises:
        DataError: it is absent or a folder, or no base64; or nothing that names a video.
        StorageError: the storage fails.
    """
    if isinstance(video, bytes):
        return video
    if not isinstance(video, str) or not video:
        raise DataError(f"no video: {video!r} is neither a path nor a URL nor the base64 of a file")
    if _is_base64(video):
        text = video.partition(",")[2] if video.startswith("data:") else video
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except ValueError as error:  # of characters beyond ASCII no binascii.Error
            raise DataError(f"{CONTENT} is no base64: {error}") from error
    try:
        return storage.read_bytes(storage.absolute(video))
    except FileNotFoundError as error:
        raise DataError(f"no video at {video}") from error
    except IsADirectoryError as error:
        raise DataError(f"{video} is a folder: name the video files") from error


def _is_base64(text: str) -> bool:
    return text.startswith("data:") or len(text) > LONGEST_PATH
