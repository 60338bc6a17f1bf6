"""Every stream of random numbers gives what it always gave, and none is made elsewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vswin_dist.models.stochastic import sample_keys, uniform
from vswin_dist.randomness import Stream, named_rng, rng

ROOT = Path(__file__).parents[2]
FIRST = {  # stream and key -> its first three numbers below 2**32, as of the first release that had it
    (Stream.AUGMENTATION, 7, 2, 11): [4221086386, 3422522718, 623743174],
    (Stream.AUGMENTATION, 7, 2, 11, 1): [283066026, 1717642264, 2960561461],
    (Stream.SUBSTITUTION, 7, 2, 40, 5): [754673567, 3185855826, 2034464144],
    (Stream.PIXELS, 7, 2, 11, 0): [3140928579, 1379915661, 460615721],
    (Stream.PIXELS, 7, 2, 11, 1): [75097635, 2776375179, 2203854693],
    (Stream.MIXING, 7, 40, 3): [2010272755, 2686929399, 2893137783],
    (Stream.AUGMENTATION, 11): [3893875891, 243864054, 3159549362],
}
NAMED = {
    "f/7/2": [1394340015, 3410938860, 1371199726],
    "f/7/subset": [647584167, 1280553904, 3723414626],
}
# What makes random numbers, or a generator of them, by the name that is called; torch.nn.init is of the initial weights.
MAKES = re.compile(
    r"(^|\.)(default_rng|Generator|SeedSequence|PCG64|RandomState|manual_seed|seed_everything|Random|SystemRandom)$"
    r"|^(random|np\.random|numpy\.random)\.\w+$"
    r"|^(torch|np|numpy)\.(rand|randn|randint|randperm|rand_like|randn_like|bernoulli|multinomial)$"
    r"|(?<!init)\.(bernoulli_|uniform_|normal_|random_|trunc_normal_)$"
)
ALLOWED = {
    "vswin_dist/randomness.py": {"np.random.default_rng", "np.random.Generator", "np.random.PCG64"},
    "vswin_dist/training/initial_model.py": {"torch.manual_seed"},
    "vswin_dist/models/weights/inflate.py": {"torch.randn", "torch.Generator", "torch.Generator().manual_seed"},
    "vswin_dist/models/swin/model.py": {"torch.randint"},
    "vswin_dist/storage.py": {"random.random"},
    "vswin_dist/evaluation/analysis.py": {"np.random.default_rng"},
    "vswin_dist/export/subject.py": {"torch.randn", "torch.Generator", "torch.Generator().manual_seed"},
}


def first(generator: np.random.Generator) -> list[int]:
    found: list[int] = generator.integers(1 << 32, size=3).tolist()
    return found


@pytest.mark.parametrize(("key", "numbers"), FIRST.items())
def test_streams_are_those_of_earlier_releases(key: tuple[Stream, *tuple[int, ...]], numbers: list[int]) -> None:
    assert first(rng(*key)) == numbers


def test_every_stream_is_held() -> None:
    assert {key[0] for key in FIRST} == set(Stream)


@pytest.mark.parametrize(("name", "numbers"), NAMED.items())
def test_named_generators_are_those_of_earlier_releases(name: str, numbers: list[int]) -> None:
    assert first(named_rng(name)) == numbers


def test_the_model_drops_what_it_dropped_in_earlier_releases() -> None:
    keys = sample_keys(7, 40, torch.tensor([11, 63]))
    assert keys.tolist() == [-4343991212967323500, 6903584568775712727]
    assert uniform(keys, 3).tolist() == [0.37138283252716064, 0.6012198328971863]


def makers(source: str) -> set[str]:
    """What of MAKES the Python text `source` calls."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return {name for name in called if MAKES.search(name)}


@pytest.mark.slow
def test_no_random_numbers_are_made_elsewhere() -> None:
    found = {}
    for package in ("vswin_dist", "data_prep", "jobs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith("vswin_dist/benchmarks/") and (calls := makers(path.read_text())):
                found[name] = {re.sub(r"\(.*\)", "()", call) for call in calls}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "call", ["np.random.default_rng(1)", "random.Random(0)", "random.shuffle(x)", "torch.manual_seed(0)", "x.normal_()"]
)
def test_the_search_finds_them(call: str) -> None:
    assert makers(f"y = {call}")
