"""Images: how they are read, moved and measured, the models that name them, and runs of seconds that learn to."""

from __future__ import annotations

import io
import lzma
import os
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import script
from torch import nn
from torch.nn import functional as F

import structlin as sl
from structlin import cli
from structlin.models.mixer import Mixer
from structlin.problems import train
from structlin.problems.vision import augment, classify, images, metrics, models
from structlin.recipes import find
from structlin.train.config import OptionError
from structlin.train.settings import override

ROOT = Path(__file__).parents[1]
TINY = {"tiny_vit": "all", "tiny_mixer": "mlp", "tiny_mnist": "all"}


def noise(count: int, side: int = 16) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noise whose brightest colour is its class."""
    labels = np.arange(count) % 3
    pixels = np.random.default_rng(0).integers(120, size=(count, side, side, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return pixels.astype(np.uint8), labels


def mosaic(tiles: np.ndarray[Any, Any], rows: int, path: Path) -> None:
    side = tiles.shape[1]
    grid = tiles.reshape(rows, -1, side, side, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(grid.reshape(rows * side, -1, 3)).save(path)


def encoded(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    pixels, labels = noise(400)
    for split, part in (("train", slice(0, 320)), ("test", slice(320, 400))):
        np.save(folder / f"colours_{split}_x.npy", pixels[part])
        np.save(folder / f"colours_{split}_y.npy", labels[part].astype(np.uint8))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Classes as folders, as Tiny ImageNet has them: images a folder deeper, those of val named by a table.

    The first class is not in val.
    """
    pixels, labels = noise(40)
    table = []
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        if index >= 24 and label == 0:
            continue
        name = f"img{index}.PNG"
        folder = tmp_path / "set" / (f"train/n0{label}/images" if index < 24 else "val/images")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image))
        if index >= 24:
            table.append(f"{name}\tn0{label}\t0\t0\t62\t62")
    (tmp_path / "set" / "val" / "val_annotations.txt").write_text("\n".join(table))
    (tmp_path / "set" / "train" / "n00" / "boxes.txt").write_text("0 0 62 62")
    unlabelled = tmp_path / "set" / "test" / "images"
    unlabelled.mkdir(parents=True)
    for index in range(24):
        (unlabelled / f"{index}.png").write_bytes(encoded(pixels[0]))
    return tmp_path / "set"


def as_pairs(found: images.Pictures) -> set[tuple[bytes, str]]:
    taken = found.take(np.arange(len(found)))
    return {(image.tobytes(), found.classes[label]) for image, label in zip(taken, found.labels, strict=True)}


# reading


def test_arrays_and_mosaics_are_read_as_they_were_written(tmp_path: Path) -> None:
    tiles, labels = noise(24, side=32)
    for index, part in enumerate(np.split(tiles, 2)):
        mosaic(part, 3, tmp_path / f"train_{index:02}.png")
    (tmp_path / "train_y.npy.xz").write_bytes(lzma.compress(_npy(labels[:22])))
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    found = images.read(tmp_path)
    assert np.array_equal(found.take(np.arange(22)), tiles[:22])
    assert found.labels.tolist() == labels[:22].tolist()
    assert found.classes == ("a", "b", "c")
    assert images.read_test(tmp_path, found) is None
    (tmp_path / "classes.json").write_text('["a"]')
    with pytest.raises(OptionError, match=r"classes.json is no list of 3 names"):
        images.read(tmp_path)
    (tmp_path / "train_x.npy.xz").write_bytes(lzma.compress(_npy(tiles[:22, :, :, 0])))
    (tmp_path / "classes.json").unlink()
    gray = images.read(tmp_path)
    assert gray.shape == (32, 32, 1)
    assert gray.about["images"] == [22, 32, 32, 1]
    assert gray.about["sha256"] != found.about["sha256"]
    assert images.read(tmp_path, size=8).shape == (8, 8, 1)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_folders_of_classes_archives_and_tables_hold_the_same_images(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    pixels, labels = noise(40)
    kept = (np.arange(40) < 24) | (labels > 0)
    pixels, labels = pixels[kept], labels[kept]
    wanted = {(image.tobytes(), f"n0{label}") for image, label in zip(pixels, labels, strict=True)}
    found = images.read(tree)
    test = images.read_test(tree, found)
    assert found.classes == ("n00", "n01", "n02")
    assert len(found) == 24
    assert test is not None
    assert as_pairs(found) | as_pairs(test) == wanted
    assert len(set(found.labels[:12].tolist())) == 3  # not class after class
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(tree, arcname=".")
    packed = images.read(tmp_path / "set.tar.xz")
    assert packed.about == found.about
    packed_test = images.read_test(tmp_path / "set.tar.xz", packed)
    assert packed_test is not None
    assert as_pairs(packed_test) == as_pairs(test)
    alone = images.read(tree / "train")  # a folder of classes without splits
    assert as_pairs(alone) == as_pairs(found)
    rows = [{"bytes": encoded(image), "path": None} for image in pixels]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, part in (("train", slice(0, 24)), ("test", slice(24, None))):
        table = pa.table({"img": rows[part], "label": labels[part]})
        parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    hub = images.read(tmp_path / "hub")
    hub_test = images.read_test(tmp_path / "hub", hub)
    assert hub_test is not None
    assert {(image, f"n0{name}") for image, name in as_pairs(hub)} == as_pairs(found)
    assert {(image, f"n0{name}") for image, name in as_pairs(hub_test)} == as_pairs(test)


def test_images_that_do_not_fit_into_memory_are_decoded_when_taken(tree: Path, monkeypatch: Any) -> None:
    kept = images.read(tree, size=8)
    monkeypatch.setattr(images, "MEMORY", 1000)
    found = images.read(tree, size=8)
    assert kept.pixels is not None
    assert found.pixels is None
    assert found.shape == kept.shape == (8, 8, 3)
    some = np.array([5, 3, 3])
    assert np.array_equal(found.take(some), kept.take(some))
    with pytest.raises(OptionError, match="too many for the memory; give --image"):
        images.read(tree)


def test_images_are_scaled_from_their_middle(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    for index in range(20):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{index}.png").write_bytes(encoded(wide if index else wide[:, :40]))
    with pytest.raises(OptionError, match=r"holds images of 16x4[08] and of 16x4[08]; give --image"):
        images.read(tmp_path)
    taken = images.read(tmp_path, size=8).take(np.arange(20))
    assert taken.shape == (20, 8, 8, 3)
    assert (taken > 180).all(axis=(1, 2, 3)).sum() == 19


def test_data_that_are_no_images_are_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--data: .*: holds no images; allowed: a folder with"):
        images.read(tmp_path)
    np.save(tmp_path / "train_y.npy", np.zeros(30, np.uint8))
    with pytest.raises(OptionError, match="holds no images"):
        images.read(tmp_path)
    np.save(tmp_path / "train_x.npy", np.zeros((29, 4, 4), np.uint8))
    with pytest.raises(OptionError, match=r"29, 4, 4, 1.* and 30 labels"):
        images.read(tmp_path)
    np.save(tmp_path / "train_y.npy", np.zeros(4, np.uint8))
    np.save(tmp_path / "train_x.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(OptionError, match="holds 4 images, and 20 are needed"):
        images.read(tmp_path)
    np.save(tmp_path / "other_train_x.npy", np.zeros((30, 4, 4), np.uint8))
    with pytest.raises(OptionError, match=r"holds other_train_x.npy and train_x.npy"):
        images.read(tmp_path)
    with pytest.raises(OptionError, match="No such file"):
        images.read(tmp_path / "missing")
    for index in range(20):
        (tmp_path / "b" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / "c" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(OptionError, match=r"c/\d+.png is no image that can be read"):
        images.read(tmp_path / "b")


# moving


def test_an_epoch_has_every_image_once_and_the_next_another_order() -> None:
    seen = np.concatenate([augment.places(3, step, 7, 20) for step in range(20)])  # 140 places, 7 epochs
    epochs = seen.reshape(7, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
    assert augment.places(3, 5, 7, 20).tolist() == seen[35:42].tolist()
    assert augment.places(4, 5, 7, 20).tolist() != seen[35:42].tolist()


def test_moved_images_are_cut_from_reflected_and_mirrored_ones() -> None:
    pixels, _ = noise(50, side=8)
    by = augment.moves(1, 2, 50, 3, True)
    assert np.array_equal(by, augment.moves(1, 2, 50, 3, True))
    assert not np.array_equal(by, augment.moves(1, 3, 50, 3, True))
    assert set(by[:, 0].tolist()) == set(range(-3, 4))
    assert set(by[:, 2].tolist()) == {0, 1}
    assert not augment.moves(1, 2, 50, 3, False)[:, 2].any()
    found = augment.moved(torch.from_numpy(pixels), torch.from_numpy(by)).numpy()
    for image, (down, right, mirrored), out in zip(pixels, by, found, strict=True):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="reflect")
        cut = padded[3 + down : 11 + down, 3 + right : 11 + right]
        assert np.array_equal(out, cut[:, ::-1] if mirrored else cut)


# models


def test_a_mixer_is_the_one_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = Mixer(image=8, patch=4, channels=3, classes=5, width=6, depth=2, token_width=7, mlp_width=9).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    w = dict(mixer.named_parameters())
    patches = x.reshape(3, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(3, 4, 48)
    h = patches @ w["patches.weight"].reshape(6, 48).T + w["patches.bias"]
    for block in ("blocks.0", "blocks.1"):
        for norm, mlp, across in (("norm1", "tokens", "t"), ("norm2", "channels", "c")):
            y = F.layer_norm(h, (6,), w[f"{block}.{norm}.weight"], w[f"{block}.{norm}.bias"])
            one, two = w[f"{block}.{mlp}.fc1.weight"], w[f"{block}.{mlp}.fc2.weight"]
            shape = (-1, 1) if across == "t" else (-1,)
            first = torch.einsum("ht,bt...->bh..." if across == "t" else "hc,btc->bth", one, y)
            first = F.gelu(first + w[f"{block}.{mlp}.fc1.bias"].reshape(shape))
            second = torch.einsum("th,bh...->bt..." if across == "t" else "ch,bth->btc", two, first)
            h = h + second + w[f"{block}.{mlp}.fc2.bias"].reshape(shape)
    h = F.layer_norm(h, (6,), w["norm.weight"], w["norm.bias"]).mean(1)
    assert torch.allclose(mixer(x), h @ w["head.weight"].T + w["head.bias"], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="patch=3 does not divide the 8 pixels of an image; patch may be 1, 2, 4, 8"):
        Mixer(8, 3, 3, 5, 6, 2, 7, 9)


@pytest.mark.parametrize(("sizes", "millions"), [((512, 8, 256, 2048), 18.5), ((768, 12, 384, 3072), 59.9)])
def test_mixers_have_the_published_sizes(sizes: tuple[int, ...], millions: float) -> None:
    """S/16 and B/16 for ImageNet, as table 3.1 of Dao et al. 2022 counts them."""
    with torch.device("meta"):
        mixer = Mixer(224, 16, 3, 1000, *sizes)
    assert sum(p.numel() for p in mixer.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", TINY)
def test_all_and_mlp_name_the_layers_of_the_blocks(name: str, arrays: Path) -> None:
    if name == "tiny_vit":
        pytest.importorskip("transformers")
    recipe = override(find(name), {"data": [str(arrays)]})
    with torch.device("meta"):
        model = classify.Classify(recipe).model()
    known = models.layers_of(model)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(linear) - set(known["all"]) == {{"tiny_vit": "classifier", "tiny_mixer": "head"}.get(name, "1.head")}
    counts = {"tiny_vit": (12, 4), "tiny_mixer": (8, 4), "tiny_mnist": (3, 2)}[name]
    assert (len(known["all"]), len(known["mlp"])) == counts
    shapes = {tuple(sorted(linear[n].weight.shape)) for n in known["mlp"]}
    assert shapes == ({(64, 64)} if name == "tiny_mnist" else {(64, 256)})


# measuring


class Says(nn.Module):
    """The second class, whatever it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 2.0, 0.0]).expand(len(x), 3)


def test_accuracy_counts_every_image_once(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "EVALUATED", 7)
    problem = classify.Classify(override(find("tiny_mnist"), {"data": [str(arrays)]}))
    assert problem.about["valid"] == 32
    logits = torch.tensor([0.0, 2.0, 0.0]).log_softmax(0)
    for found, labels in ((problem.evaluate(Says()), problem.train.labels[288:]),
                          (problem.test(Says()), np.arange(320, 400) % 3)):  # fmt: skip
        loss, share, error = found.values()
        assert share == (labels == 1).mean()
        assert error == pytest.approx(np.sqrt(share * (1 - share) / len(labels)))
        assert loss == pytest.approx(-logits[labels].mean().item(), rel=1e-6)


def test_held_out_images_are_not_trained_on_and_the_rest_are(arrays: Path) -> None:
    recipe = override(find("tiny_mnist"), {"data": [str(arrays)], "batch": "50"})
    problem = classify.Classify(recipe)
    seen = np.concatenate([augment.places(0, step, 50, problem.count) for step in range(6)])
    assert set(seen.tolist()) == set(range(288))
    assert set(problem.valid.tolist()) == set(range(288, 320))


def test_batches_are_scaled_and_follow_from_seed_and_step(arrays: Path) -> None:
    problem = classify.Classify(override(find("tiny_vit"), {"data": [str(arrays)], "batch": "288"}))
    x, y = problem.batch(0)
    assert x.shape == (288, 3, 16, 16)
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.05)
    again = problem.batch(0)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    other = problem.batch(1)
    assert not torch.equal(y, other[1])
    still = classify.Classify(
        override(find("tiny_vit"), {"data": [str(arrays)], "batch": "288", "shift": "0", "mirror": "false"})
    )
    plain, labels = still.batch(0)
    assert torch.equal(labels, y)
    assert not torch.equal(plain, x)
    assert torch.equal(plain.mean((2, 3)).argmax(1), labels)  # images and their classes stay together
    assert torch.equal(x.mean((2, 3)).argmax(1), y)


def test_seconds_to_an_accuracy_are_those_of_the_first_validation_that_has_it() -> None:
    series = {"seconds": [1.0, 2.0, 3.0, 4.0], "accuracy": [0.2, 0.5, 0.4, 0.6]}
    assert metrics.seconds_to(0.5, series) == 2.0
    assert metrics.seconds_to(0.55, series) == 4.0
    assert metrics.seconds_to(0.7, series) is None


# runs


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("tiny_mnist", "dense"),
        ("tiny_mixer", "monarch:nblocks=4"),
        ("tiny_vit", "btt"),
        pytest.param("tiny_mnist", "dyad:nblocks=8", marks=pytest.mark.slow),
        pytest.param("tiny_mixer", "pixelfly:block_size=8:butterfly_size=8", marks=pytest.mark.slow),
        pytest.param("tiny_vit", "dense", marks=pytest.mark.slow),
    ],
)
def test_tiny_recipes_learn(name: str, structure: str, arrays: Path, tmp_path: Path) -> None:
    if name == "tiny_vit":
        pytest.importorskip("transformers")
    fields = {"structure": structure, "data": [str(arrays)], "steps": "30", "device": "cpu", "valid_every": "15"}
    record = train(override(find(name), {**fields, "batch": "32"}), tmp_path, "c", lambda line: None)
    metrics = record["metrics"]
    assert record["status"] == "ok"
    assert metrics["test_accuracy"] is not None
    assert metrics["test_accuracy"] > 0.9
    assert metrics["valid_loss"] == record["series"]["valid_loss"][-1]
    assert 0 <= (metrics["accuracy_se"] or 0) < 0.1
    assert record["config"]["layers"] == TINY[name]
    assert 0 <= (metrics["swapped_params"] or 0) <= 0.5 * (metrics["replaced_params"] or 0)
    assert (metrics["swapped_params"] == 0) == (structure == "dense")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1430, 550)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": "5"}, "--heads: 5 heads do not divide the width 64"),
        ({"model": "cnn"}, "--model: 'cnn' is given; allowed: vit, mixer, mlp"),
        ({"valid_share": "1"}, "--valid-share: 1.0 is given; allowed: between 0 and 1"),
        ({"shift": "-1"}, "--shift: -1 is given; allowed: 0 or more"),
        ({"shift": "16"}, "--shift: 16 is given; images of 16 pixels allow less"),
        ({"patch": "5"}, "--patch 5 does not divide the 16 pixels of an image; allowed: 1, 2, 4, 8, 16"),
        ({"data": ["a", "b"]}, "--data: 2 paths are given; allowed: one folder or archive"),
        ({"structure": "monarch:nblocks=5"}, "nblocks=5 does not fit 64x64"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    fields: dict[str, Any], message: str, arrays: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as raised:
        train(override(find("tiny_vit"), {"data": [str(arrays)], **fields}), tmp_path / "run", "c", lambda line: None)
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_data_may_be_named_by_a_variable(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(images.VARIABLE, raising=False)
    with pytest.raises(OptionError, match="0 paths are given"):
        classify.given(())
    monkeypatch.setenv(images.VARIABLE, str(arrays))
    assert classify.given(()) == arrays


@pytest.mark.slow
def test_commands_of_the_page_run(arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "pictures"):
        (tmp_path / name).symlink_to(arrays)
    text = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    commands = re.findall(r"^structlin (train tiny_.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert cli.main([*shlex.split(command), "--steps", "4"]) == 0, command
    assert len(list(tmp_path.glob("runs/*/picture.png"))) == 3
    others = re.findall(r"^structlin train (\S+) --data \S+ (.*)$", text, re.MULTILINE)[3:]
    for recipe, options in others:
        words = shlex.split(options)
        names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
        override(find(recipe), dict(zip(names, words[1::2], strict=True)))


def test_a_compiled_vit_attends_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which fast kernels do not take; transformers writes one out where a compilation looks like an export to it."""
    masking = pytest.importorskip("transformers.masking_utils")
    monkeypatch.setattr(masking, "is_torchdynamo_exporting", lambda: True)  # as PyTorch 2.11 says of every compilation
    found: list[Any] = []

    def attend(*given: Any, attn_mask: Any = None, **more: Any) -> torch.Tensor:
        found.append(attn_mask)
        return attention(*given, attn_mask=attn_mask, **more)

    attention, recipe = F.scaled_dot_product_attention, find("tiny_vit")
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    models.build(recipe, (32, 32, 3), 10)(torch.randn(2, 3, 32, 32))
    assert found == [None] * recipe.depth


# the comparison on a GPU


claims = script("claims_vision")
benchmark = script("vision")


@pytest.mark.parametrize(
    "recipe",
    ["mixer_cifar10", "mnist_mlp", "mixer_mnist", "vit_mnist", "mixer_tiny_imagenet",
     pytest.param("vit_cifar10", marks=pytest.mark.slow)],
)  # fmt: skip
def test_structures_of_the_plan_fit_and_have_at_most_half_of_the_parameters(recipe: str) -> None:
    if recipe.startswith("vit"):
        pytest.importorskip("transformers")
    runs = list(benchmark.plan(40, SWEEP))
    assert len({run.name for run in runs}) == len(runs) == 5 + 3 * (4 * 5 + 3 * 6) + 16 + 2 * 5 + 3 * 6
    (shape,) = {benchmark.SHAPES[run.data] for run in runs if run.recipe == recipe and run.data}
    with torch.device("meta"):
        dense = models.build(find(recipe), shape, 10)
    for run in (run for run in runs if run.recipe == recipe and run.data and run.given["structure"] != "dense"):
        fields = override(find(recipe), {name: str(value) for name, value in run.given.items()})
        rules = dict.fromkeys(models.layers_of(dense)[fields.layers], sl.spec.parse(fields.structure))
        swaps = sl.to_structured_(dense, rules, dry_run=True)
        assert sum(swap.params for swap in swaps) <= 0.5 * sum(swap.dense_params for swap in swaps), run.name


def swept(label: str, accuracies: dict[float, float]) -> dict[str, Any]:
    """Records of a sweep: times the rate it starts at, and accuracy."""
    start = benchmark.STARTS["vit_cifar10"]
    return {
        f"vit_cifar10@{times * start:g}-{label}-s0": {
            "config": {"given": {"lr": times * start}}, "metrics": {"accuracy": accuracy},
        }
        for times, accuracy in accuracies.items()
    }  # fmt: skip


SWEEP = {name: run for label in benchmark.STRUCTURES for name, run in swept(label, {1: 0.7, 2: 0.8, 4: 0.6}).items()}


def test_each_structure_trains_at_the_rate_at_which_it_was_best() -> None:
    before = {run.name: run for run in benchmark.plan(40, {})}
    assert {name for name in before if name.startswith("vit_")} - {n for n in before if n.startswith("vit_mnist")} == {
        f"vit_cifar10@0.00025-{label}-s0" for label in benchmark.STRUCTURES
    }
    assert "mixer_cifar10-dense-s0" in before
    apart = SWEEP | swept("dense", {1: 0.7, 0.5: 0.6, 2: 0.5})
    after = {run.name: run for run in benchmark.plan(40, apart)}
    for name in ("vit_cifar10-btt4-s2", "vit_tiny_imagenet-monarch4-s1"):
        assert after[name].given["lr"] == 5e-4
    assert after["vit_cifar10-dense-s0"].given["lr"] == 2.5e-4
    assert "lr" not in after["mixer_cifar10-dense-s0"].given
    kept = {"vit_cifar10@0.00025-dense-s0": {"config": {"given": after["vit_cifar10-dense-s0"].given}}}
    assert benchmark.again(after["vit_cifar10-dense-s0"], kept) is kept["vit_cifar10@0.00025-dense-s0"]
    assert benchmark.again(after["vit_cifar10-dense-s1"], kept) is None


@pytest.mark.parametrize(
    ("accuracies", "times", "ready"),
    [({1: 0.7}, 0.5, False), ({1: 0.7, 0.5: 0.6}, 2, False), ({1: 0.7, 0.5: 0.8}, 0.25, False),
     ({1: 0.7, 0.5: 0.8, 0.25: 0.6}, 0.5, True), ({2: 0.7}, 1, False), ({1: 0.7, 0.5: None, 2: 0.6}, 1, True)],
)  # fmt: skip
def test_a_sweep_goes_on_until_a_worse_rate_is_on_both_sides(
    accuracies: dict[float, float], times: float, ready: bool
) -> None:
    kept = swept("btt4", accuracies) | swept("dense", {8: 0.9})
    assert benchmark.sweep(kept, "vit_cifar10", "btt4") == (times * 2.5e-4, ready)


def run_record(name: str, accuracy: float, step: float, share: float = 1.0) -> dict[str, Any]:
    metrics = {"test_accuracy": accuracy, "accuracy": accuracy, "step_seconds": step, "params_share": share}
    metrics |= {"model_params": 1e6 * share}
    series = {"step": [100, 200], "accuracy": [accuracy, accuracy]}
    return {"name": name, "metrics": metrics, "series": series, "status": "ok"}


def test_verdicts_follow_from_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {claim: measure for claim, _, _, measure in claims.ROWS}
    assert len(rows) == len(claims.ROWS)
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(claims, "named", lambda device="h200": {r["name"]: r for r in found})
    assert {measure() for measure in rows.values()} == {None}
    for seed, off in enumerate((-0.002, 0.0, 0.002)):
        found.append(run_record(f"vit_cifar10-dense-s{seed}", 0.85 + off, 0.01))
        found.append(run_record(f"vit_cifar10-monarch4-s{seed}", 0.845 + off, 0.008, 0.39))
        found.append(run_record(f"vit_cifar10-pixelfly-s{seed}", 0.835 + off, 0.02, 0.35))
    for label, seconds, share in (("dense", 0.019, 1.0), ("monarch4", 0.01, 0.4)):
        found.append({**run_record(f"step-vit_s16-{label}", 0, seconds, share), "series": {}})
    said, good = rows["ViT with Monarch, n=4, is as accurate"]()
    assert good
    assert "monarch4 84.50 ± 0.20 (3 seeds) with 39% of the parameters, steps 1.25 times as fast" in said
    assert "after 0.80 of its time" in said
    said, good = rows["ViT with Pixelfly is as accurate"]()
    assert not good
    assert "never at dense's accuracy less a point" in said
    said, good = rows["ViT: within a point of dense with at most half of the parameters"]()
    assert good
    assert said.startswith("best: monarch4")
    said, good = rows["ViT-S/16 with Monarch trains faster"]()
    assert good
    assert said == "monarch4 1.90 times as fast, whole step, bf16, 0.4M parameters instead of 1.0M"
    for run in found[:9]:  # as they are where other work ran on the device
        run["metrics"]["step_seconds"] = None
    said, good = rows["ViT with Monarch, n=4, is as accurate"]()
    assert good
    assert said.endswith("monarch4 84.50 ± 0.20 (3 seeds) with 39% of the parameters")
    for label, step in (("dense", 0.01), ("monarch4", 0.005)):
        found.append({**run_record(f"step-vit_cifar10-{label}", 0, step), "series": {}})
    said, _ = rows["ViT with Monarch, n=4, is as accurate"]()
    assert "steps 2.00 times as fast, at dense's accuracy less a point after 0.50 of its time" in said
    claims.draw(found, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.size == (550, 825)


# models of others


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
@pytest.mark.parametrize("structure", ["monarch:nblocks=4", "dyad:nblocks=4"])
def test_models_of_timm_convert(name: str, structure: str) -> None:
    timm = pytest.importorskip("timm")  # needs torchvision, which the torch of the tests has no build of
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    before = sum(p.numel() for p in model.parameters())
    channels = "blocks.*.mlp_channels.*" if name.startswith("mixer") else "blocks.*"
    swaps = sl.to_structured_(model, {channels: sl.spec.parse(structure)})
    assert len(swaps) == (16 if name.startswith("mixer") else 48)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    loss = models.logits(model, torch.randn(2, 3, 224, 224)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    sl.to_dense_(model)
    assert sum(p.numel() for p in model.parameters()) == before


# data of one's own


@pytest.mark.skipif(not os.environ.get(images.VARIABLE), reason=f"needs a folder of images in {images.VARIABLE}")
def test_images_of_ones_own_can_be_learned(tmp_path: Path) -> None:
    recipe = override(find("tiny_mixer"), {"steps": "30", "device": "cpu", "image": "32", "valid_images": "100"})
    record = train(recipe, tmp_path, "c", lambda line: None)
    assert record["series"]["train_loss"][-1] < record["series"]["train_loss"][0]
