"""A model as the folder of a Hugging Face repository: weights, `config.json`, a card for people, and our own card.

The folder is a model folder of this project too: `model.safetensors` and `model.json` are the portable model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vswin_dist import storage
from vswin_dist.export.subject import Subject
from vswin_dist.models import count_parameters
from vswin_dist.models.weights.portable import write_model
from vswin_dist.tracking import redact

CONFIG, README = "config.json", "README.md"
MOST_CLASSES = 50  # that the card for people lists
USE = """```python
from vswin_dist.models.weights.portable import load_model

model, card = load_model("{folder}")  # where this repository lies: a folder or any fsspec URL
logits = model(clips)  # float32 {clips}, pixels of 0 to 255 less `mean`, divided by `std`
```
"""


def write_folder(subject: Subject, path: Path) -> None:
    """Write the repository's four files into the folder `path`."""
    card, folder = subject.card, str(path)
    lineage = json.loads(redact(json.dumps(card.lineage)))
    write_model(folder, subject.model, classes=card.classes, preprocessing=card.preprocessing, lineage=lineage)
    text = json.dumps(config(subject), indent=2, ensure_ascii=False) + "\n"
    storage.put_bytes(storage.join(folder, CONFIG), text.encode())
    storage.put_bytes(storage.join(folder, README), "".join(readme(subject)).encode())


def config(subject: Subject) -> dict[str, Any]:
    """Make the content of `config.json`: names of classes as Hugging Face has them, settings, and how clips are cut."""
    classes = subject.card.classes
    return {
        "architectures": ["VideoSwin"],
        "model_type": "video_swin",
        "torch_dtype": "float32",
        "num_labels": subject.model.architecture.num_classes,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "num_frames": subject.clips.shape[0],
        "image_size": list(subject.clips.shape[1:]),
        "settings": dict(subject.model.settings),
        "preprocessing": dict(subject.card.preprocessing),
    }


def readme(subject: Subject) -> Iterator[str]:
    """Write the card for people, with the front matter that Hugging Face reads."""
    name, card, settings = _title(subject.reference), subject.card, subject.model.settings
    front = {
        "library_name": "vswin_dist",
        "pipeline_tag": "video-classification",
        "tags": ["video-classification", "video-swin-transformer", str(settings["name"])],
    }
    yield f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n"
    yield (
        f"Video Swin Transformer (arXiv 2106.13230), `{settings['name']}`, {count_parameters(subject.model):,} parameters, "
        f"{subject.model.architecture.num_classes} classes. Made by vswin_dist of `{redact(subject.reference)}`.\n\n"
    )
    yield f"## Use\n\n{USE.format(folder=name, clips=subject.clips)}\n"
    yield from _table("How clips are cut", card.preprocessing)
    yield from _table("Scores and origin", {**card.lineage, **subject.facts})
    yield "## Classes\n\n"
    if not card.classes:
        yield "None: the head was never trained.\n\n"
    elif len(card.classes) > MOST_CLASSES:
        yield f"{len(card.classes)}; their names are in `{CONFIG}`.\n\n"
    else:
        yield "".join(f"- {_plain(c)}\n" for c in card.classes) + "\n"
    yield (
        "## Limits\n\nThe model knows the classes above alone, and names one of them for any video. It was scored on videos "
        "like those it was trained on. The licence of its weights is not stated here: it depends on the videos and on the "
        "weights that training started from.\n"
    )


def _title(reference: str) -> str:
    """`models:/NAME/3` -> NAME; the last part of a folder or URL."""
    parts = redact(reference).removeprefix("models:/").rstrip("/").split("/")
    return parts[0] if reference.startswith("models:/") else parts[-1]


def _table(heading: str, values: Any) -> Iterator[str]:
    """Write a table of names and values that are known; nothing where there are none."""
    known = {name: value for name, value in values.items() if value is not None}
    if known:
        rows = "".join(f"| {_plain(k)} | {_plain(redact(str(v)))} |\n" for k, v in known.items())
        yield f"## {heading}\n\n| | |\n|---|---|\n{rows}\n"


def _plain(text: Any) -> str:
    """Write `text` so that a table of Markdown holds it."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
