"""Decoding: from the bytes of a video to the frames that a clip needs, cropped and resized."""
