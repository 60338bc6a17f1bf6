"""What a horizontal flip does to a class: left becomes right, clockwise becomes counter-clockwise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# A name's words: "Swiping Left", "swipe_left" and "SwipeLeft" alike.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_SAME = {"cw": "clockwise", "ccw": "counterclockwise", "anticlockwise": "counterclockwise"}
_OPPOSITE = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}


def flipped_classes(classes: Sequence[str], flip_labels: str) -> list[int | None]:
    """Find for each class id that of its horizontally flipped clips; None where they must not be flipped.

    Args:
        flip_labels: `keep` leaves every class what it is. `mirror` sends a class whose name says left, right,
            clockwise or counter-clockwise (also anticlockwise, CW, CCW) to the one of the opposite name, and to None
            where there is no such class or several.
    """
    if flip_labels == "keep":
        return list(range(len(classes)))
    names = [_words(name) for name in classes]
    ids = {name: i for i, name in enumerate(names)}
    count = Counter(names)
    found: list[int | None] = []
    for i, name in enumerate(names):
        mirrored = tuple(_OPPOSITE.get(word, word) for word in name)
        if mirrored == name:
            found.append(i)
        else:
            found.append(ids[mirrored] if count[mirrored] == 1 and count[name] == 1 else None)
    return found


def _words(name: str) -> tuple[str, ...]:
    """Return the words of `name` in lower case, with one spelling for each sense of rotation."""
    words: list[str] = []
    for match in _WORD.finditer(name):
        word = _SAME.get(match[0].lower(), match[0].lower())
        if word == "clockwise" and words and words[-1] in ("counter", "anti"):
            words[-1] = "counterclockwise"
        else:
            words.append(word)
    return tuple(words)
