"""Every layout is recognised by content, fitted, explained; what does not fit is refused with both shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vswin_dist.errors import CheckpointError, ConfigError
from vswin_dist.models import LoadReport, VideoSwin, break_time_symmetry, build_model, export_state, inflate, load_pretrained
from vswin_dist.models.weights.bias_tables import resize_table

SMALL: dict[str, Any] = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def small(**settings: Any) -> VideoSwin:
    return build_model("swin_t", **{**SMALL, "window_size": (2, 7, 7), **settings}).eval()


def image_model(window: int = 7) -> VideoSwin:
    return small(patch_size=(1, 4, 4), window_size=(1, window, window))


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.replace("head.", "head.fc.") for name in state}
    names |= {n: n.replace("layers.0.downsample", "layers.1.downsample") for n in state if "downsample" in n}
    return {names[name]: tensor for name, tensor in state.items() if not name.endswith("_index")}


def actions(report: LoadReport) -> dict[str, int]:
    return {action: n for action, n in report.counts().items() if n}


@pytest.mark.parametrize(("layout", "wrapper"), [("official", "state_dict"), ("torchvision", None), ("native", None)])
def test_video_layouts_come_back(tmp_path: Path, layout: str, wrapper: str | None) -> None:
    model, other = small(), small()
    state = export_state(model, layout)
    path = tmp_path / "weights"
    torch.save({wrapper: state, "meta": {"epoch": 3}} if wrapper else state, path)
    report = load_pretrained(other, path)
    assert report.layout == layout
    assert set(actions(report)) <= {"taken", "dropped"}
    x = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(other(x), model(x))
    assert "relative_position_bias_table" in str(report)
    assert report.counts()["taken"] == len(model.state_dict())


def test_safetensors_and_dry_run_on_meta(tmp_path: Path) -> None:
    save_file(export_state(small(), "native"), tmp_path / "a.bin")
    with torch.device("meta"):
        model = small(num_classes=9)
    report = load_pretrained(model, tmp_path / "a.bin", dry_run=True)
    assert actions(report) == {"taken": len(model.state_dict()) - 2, "fresh": 2}
    with pytest.raises(CheckpointError, match="meta device"):
        load_pretrained(model, tmp_path / "a.bin")


def test_timm_layout_is_written_as_timm_names_it() -> None:
    image = image_model()
    found, expected = export_state(image, "timm2d"), to_timm(export_state(image, "microsoft2d"))
    assert found.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("timm", [False, True])
def test_image_layouts_inflate(tmp_path: Path, timm: bool) -> None:
    image, video = image_model(), small(bias_index="official")
    state = export_state(image, "microsoft2d")
    assert state["patch_embed.proj.weight"].dim() == 4
    torch.save(to_timm(state) if timm else {"model": state}, tmp_path / "image.pth")
    report = load_pretrained(video, tmp_path / "image.pth")
    assert report.layout == ("timm2d" if timm else "microsoft2d")
    assert actions(report)["inflated"] == 5
    still = torch.randn(1, 3, 1, 56, 56)
    expected = image.forward_features(still)
    got = video.forward_features(still.expand(-1, -1, 8, -1, -1))
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-4, atol=1e-4)


def test_nano_inflates_with_its_three_stages() -> None:
    image = build_model("swin_nano", 7, patch_size=(1, 4, 4), window_size=(1, 7, 7))
    assert image(torch.randn(2, 3, 1, 64, 64)).shape == (2, 7)
    report = inflate({"model": export_state(image, "microsoft2d")}, build_model("swin_nano", 5))
    assert report.counts()["inflated"] == 7


def test_centre_variants() -> None:
    state = export_state(image_model(), "microsoft2d")
    video = small()
    inflate(state, video, embedding="centre", bias="centre")
    kernel = video.state_dict()["patch_embed.proj.weight"]
    assert torch.equal(kernel[:, :, 1], state["patch_embed.proj.weight"])
    assert not kernel[:, :, 0].any()
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    table = video.state_dict()[name].view(3, 169, -1)
    assert torch.equal(table[1], state[name])
    assert (table[[0, 2]] == -4.6).all()
    with pytest.raises(ConfigError, match="duplicate"):
        inflate(state, video, bias="center")


def test_tables_resize_in_space_and_time(tmp_path: Path) -> None:
    source = small(window_size=(4, 7, 7))
    torch.save({"state_dict": export_state(source)}, tmp_path / "k400.pth")
    longer = small(window_size=(8, 7, 7), num_classes=3)
    report = load_pretrained(longer, tmp_path / "k400.pth")
    assert actions(report)["resized"] == 4
    assert actions(report)["fresh"] == 2
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    old, new = (m.state_dict()[name].view(-1, 169, 2) for m in (source, longer))
    torch.testing.assert_close(new[7], old[3])  # offset 0 stays
    larger = small(window_size=(4, 12, 12))
    assert actions(load_pretrained(larger, tmp_path / "k400.pth"))["resized"] == 4
    expected = torch.nn.functional.interpolate(
        old.permute(2, 0, 1).view(2, 7, 13, 13), size=(23, 23), mode="bicubic", align_corners=False
    )
    assert torch.equal(larger.state_dict()[name].t().view(2, 7, 23, 23), expected)


def test_resizing_keeps_constants_and_equal_windows() -> None:
    table = torch.randn(3 * 5 * 5, 2)
    assert torch.equal(resize_table(table, (2, 3, 3), (2, 3, 3)), table)
    ones = resize_table(torch.ones(3 * 5 * 5, 2, dtype=torch.float64), (2, 3, 3), (5, 4, 6))
    torch.testing.assert_close(ones, torch.ones(9 * 7 * 11, 2, dtype=torch.float64))


@pytest.mark.parametrize("design", ["split", "factorized"])
def test_image_weights_start_the_other_designs(design: str) -> None:
    model = small(attention_design=design)
    report = inflate(export_state(image_model(), "microsoft2d"), model)
    fresh = [row.name for row in report.rows if row.action == "fresh"]
    assert all("temporal" in name or name.startswith("head.") for name in fresh)
    with pytest.raises(ConfigError, match="native"):
        export_state(model, "official")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(export_state(small(), "native"), path)
    with pytest.raises(CheckpointError, match=r"\[12, 3, 2, 4, 4\] in the checkpoint, \[24, 3, 2, 4, 4\] in the model"):
        load_pretrained(small(embed_dim=24), path)
    with pytest.raises(CheckpointError, match="absent"):
        load_pretrained(small(depths=(2, 4)), path)
    with pytest.raises(CheckpointError, match="no such tensor"):
        load_pretrained(small(depths=(2, 1)), path)
    with pytest.raises(CheckpointError, match="video model"):
        inflate(export_state(small(), "native"), small())
    with pytest.raises(ConfigError, match="image models"):
        export_state(small(), "microsoft2d")


QKV = "backbone.layers.0.blocks.0.attn.qkv.weight"
INDEX = "backbone.layers.0.blocks.0.attn.relative_position_index"
BIAS = "cls_head.fc_cls.bias"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {  # what replaces tensors of a good file (None: is missing), the message
    "integers": ({QKV: torch.zeros(36, 12, dtype=torch.int64)}, "int64"),
    "complex": ({QKV: torch.zeros(36, 12, dtype=torch.complex64)}, "complex64"),
    "sparse": ({QKV: torch.zeros(36, 12).to_sparse()}, "sparse"),
    "nan": ({QKV: torch.full((36, 12), float("nan"))}, "432 values are NaN"),
    "no values": ({QKV: torch.zeros(36, 12, device="meta")}, "no values"),
    "half a head": ({BIAS: None}, "belong together"),
    "two heads": ({BIAS: torch.zeros(9)}, "belong together"),
    "twice": ({"norm.weight": torch.zeros(24)}, "a second tensor"),
    "mask of no block": ({"backbone.layers.9.attn_mask": torch.zeros(1)}, "no such tensor"),
    "index in another order": ({INDEX: torch.arange(98 * 98).view(98, 98)}, "index"),
    "index of another window": ({INDEX: torch.zeros(49, 49)}, "49 tokens"),
    "nested": ({"backbone.more": {"weight": torch.zeros(1)}}, "a dict among the tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_change_nothing(tmp_path: Path, case: str) -> None:
    changes, message = HOSTILE[case]
    state = {**export_state(small(), "official"), **changes}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "a.pth")
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, tmp_path / "a.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_lies_beside_the_weights_is_listed(tmp_path: Path) -> None:
    state = export_state(small(), "native")
    torch.save({"model": {**state, "epoch": 3}, "optimizer": {"state": {}}, "meta": "x"}, tmp_path / "a.pth")
    rows = load_pretrained(small(), tmp_path / "a.pth").rows
    assert {row.name: row.reason for row in rows if row.action == "dropped"} == {
        "epoch": "int, not a tensor",
        "optimizer": "dict beside the weights",
        "meta": "str beside the weights",
    }
    torch.save({"model": state, "state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="state_dict and model"):
        load_pretrained(small(), tmp_path / "a.pth")


PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "model._orig_mod.",
    "encoder.",
    "model.encoder.",
    "net.module.",
    "_fsdp_wrapped_module.",
)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["official", "torchvision", "native", "microsoft2d", "timm2d"])
def test_what_training_puts_before_the_names_is_taken_off(tmp_path: Path, layout: str, prefix: str) -> None:
    flat = layout in ("microsoft2d", "timm2d")
    source = image_model() if flat else small()
    state = export_state(source, "microsoft2d" if flat else layout)
    state = to_timm(state) if layout == "timm2d" else state
    plain, wrapped = small(), small()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"{prefix}{name}": tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pth")
    expected, report = load_pretrained(plain, tmp_path / "plain.pth"), load_pretrained(wrapped, tmp_path / "wrapped.pth")
    assert (report.layout, report.rows) == (expected.layout, expected.rows) and report.layout == layout
    heads = ("head.weight", "head.bias") if flat else ()
    ours = wrapped.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items() if name not in heads)


def test_parts_that_were_wrapped_or_held_apart_find_their_place(tmp_path: Path) -> None:
    """A compiled backbone, activation checkpointing of a block, and a classifier beside the encoder."""
    model, other = small(), small()
    for rename in (
        lambda name: name.replace("backbone.", "backbone._orig_mod."),
        lambda name: name.replace(".blocks.1.", ".blocks.1._checkpoint_wrapped_module."),
        lambda name: name.replace("backbone.", "encoder.").replace("cls_head.fc_cls.", "head."),
    ):
        torch.save({rename(name): tensor for name, tensor in export_state(model, "official").items()}, tmp_path / "a.pth")
        assert load_pretrained(other, tmp_path / "a.pth").counts()["taken"] == len(model.state_dict())
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_counters_are_dropped_and_listed(tmp_path: Path) -> None:
    """Those of thop, of AveragedModel and of the like; never a weight of that name."""
    state = {f"module.{name}": tensor for name, tensor in export_state(small(), "native").items()}
    counters = {"n_averaged": torch.tensor(3), "module.total_ops": torch.zeros(1, dtype=torch.float64)}
    counters |= {"module.layers.0.blocks.1.mlp.total_params": torch.zeros(1, dtype=torch.float64)}
    torch.save(state | counters, tmp_path / "a.pth")
    rows = load_pretrained(small(), tmp_path / "a.pth").rows
    assert {row.name: row.reason for row in rows if row.action == "dropped"} == dict.fromkeys(
        counters, "counter, not a weight"
    )
    torch.save(state | {"module.total_ops": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"total_ops \[2\]: the model has no such tensor"):
        load_pretrained(small(), tmp_path / "a.pth")


def copied(weights: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    """How files hold an averaged copy beside the weights: timm, DeiT, torchvision, mmengine, Lightning modules."""
    wrapped = {f"module.{name}": tensor for name, tensor in average.items()}
    flat = {f"model.{name}": tensor for name, tensor in weights.items()}
    return {
        "timm": {"state_dict": weights, "state_dict_ema": average, "epoch": 3, "arch": "swin"},
        "deit": {"model": weights, "model_ema": average, "optimizer": {"state": {}}},
        "torchvision": {"model": weights, "model_ema": {"n_averaged": torch.tensor(9), **wrapped}, "lr_scheduler": {}},
        "mmengine": {"state_dict": weights, "ema_state_dict": {"steps": torch.tensor(9), **wrapped}},
        "flat": {"state_dict": flat | {f"ema_model.{name}": tensor for name, tensor in average.items()}},
        "flat module": {"state_dict": flat | {f"ema.module.{name}": tensor for name, tensor in average.items()}},
        "beside the bare weights": weights | {f"model_ema.{name}": tensor for name, tensor in average.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("kind", copied({}, {}))
def test_an_averaged_copy_is_taken_where_it_is_asked_for(tmp_path: Path, kind: str, layout: str) -> None:
    weights, average = small(), small()
    content = copied(export_state(weights, layout), export_state(average, layout))[kind]
    torch.save(content, tmp_path / "a.pth")
    for ema, source in ((False, weights), (True, average)):
        model = small()
        report = load_pretrained(model, tmp_path / "a.pth", ema=ema)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.state_dict().items())
        assert any(row.action == "dropped" for row in report.rows)
        with torch.device("meta"):
            shapes = small()
        assert load_pretrained(shapes, tmp_path / "a.pth", ema=ema, dry_run=True).rows == report.rows


def test_a_copy_is_neither_taken_unasked_nor_made_up(tmp_path: Path) -> None:
    state, path = export_state(small(), "native"), tmp_path / "a.pth"
    for content in ({"model_ema": state}, {"state_dict": {f"ema_model.{name}": tensor for name, tensor in state.items()}}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"an EMA copy of weights under .*: model\.init_ema=true takes it"):
            load_pretrained(small(), path)
        assert load_pretrained(small(), path, ema=True).counts()["taken"] == len(state)
    for content in (state, {"model": state}, {"model": state, "ema": {}}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="holds no EMA copy of the weights"):
            load_pretrained(small(), path, ema=True)
    torch.save({"model_ema": state, "teacher": state}, path)
    with pytest.raises(CheckpointError, match="under model_ema and teacher: save the one"):
        load_pretrained(small(), path, ema=True)
    torch.save({f"{who}.{name}": tensor for who in ("a", "b") for name, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"under a\.\* and b\.\*: save the one"):
        load_pretrained(small(), path)
    torch.save(state | {"module.norm.weight": state["norm.weight"]}, path)
    with pytest.raises(CheckpointError, match=r"module\.norm\.weight \[24\]: a second tensor that means norm\.weight"):
        load_pretrained(small(), path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_cut_files_are_damaged(tmp_path: Path, form: str) -> None:
    path, state = tmp_path / "a", export_state(small(), "native")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in (3, 7, 9, 40, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_pretrained(small(), path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("true",))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(CheckpointError, match="no such file"):
        load_pretrained(small(), path)
    torch.save({"model": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"execute code \(posix.system\)"):
        load_pretrained(small(), path)
    for content in (b"", b"hello, this is no checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_pretrained(small(), path)
    torch.save({"resnet.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a known layout"):
        load_pretrained(small(), path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_pretrained(small(), path)


def test_broken_time_symmetry_shows_in_motion_and_not_in_stills() -> None:
    model = build_model("swin_nano", num_classes=2).eval()
    flat = build_model("swin_nano", num_classes=2, patch_size=(1, 4, 4), window_size=(1, 4, 4))
    inflate(export_state(flat, "microsoft2d"), model)
    still = torch.rand(1, 3, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    moving = torch.rand(1, 3, 2, 32, 32)

    def embed(clip: Tensor) -> Tensor:
        return model.patch_embed.proj(clip)

    before = embed(still)
    assert torch.allclose(embed(moving), embed(moving.flip(2)), atol=1e-5)
    break_time_symmetry(model, 1.0, seed=0)
    assert torch.allclose(embed(still), before, atol=1e-5)
    assert not torch.allclose(embed(moving), embed(moving.flip(2)), atol=1e-2)
