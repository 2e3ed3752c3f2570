"""Accelerated MRI: files, simulated coils, SENSE, the learnable transform, metrics, and a run on generated images."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import script
from torch import Tensor

import structlin as sl
from structlin import cli, recipes
from structlin.problems.mri import MonarchSense, MriRecipe, UNet, acquisition, files
from structlin.problems.mri.metrics import psnr_db, ssim
from structlin.problems.mri.problem import MriProblem
from structlin.problems.mri.sense import coil_maps, combine, sense, zero_filled
from structlin.report import records
from structlin.train.config import OptionError
from structlin.train.settings import override

SIDE = 24


def blobs(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    """Images of a few ellipses each, from 0 to 1; nothing at their edges."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    image = torch.zeros(count, height, width)
    for _ in range(4):
        a, b, u, v, light = (torch.rand(count, 1, 1, generator=generator) for _ in range(5))
        inside = ((y - 0.6 * a + 0.3) / (0.2 + 0.3 * u)) ** 2 + ((x - 0.6 * b + 0.3) / (0.2 + 0.3 * v)) ** 2 < 1
        image = torch.where(inside, 0.3 + 0.7 * light, image)
    return image / image.amax((1, 2), keepdim=True)


def png(image: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((255 * image).byte().numpy()).save(buffer, "png")
    return buffer.getvalue()


def nifti(values: np.ndarray[Any, Any], order: str = "<", slope: float = 0.0) -> bytes:
    header = bytearray(348)
    struct.pack_into(order + "i", header, 0, 348)
    struct.pack_into(order + "8h", header, 40, 3, *values.shape, 1, 1, 1, 1)
    struct.pack_into(order + "h", header, 70, 4)
    struct.pack_into(order + "3f", header, 108, 352.0, slope, 1.0)
    header[344:348] = b"n+1\0"
    return bytes(header) + bytes(4) + values.astype(order + "i2").tobytes(order="F")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `files.read` takes it: an archive of slices, a volume, measured k-space."""
    path = tmp_path_factory.mktemp("mri")
    with tarfile.open(path / "slices.tar.xz", "w:xz") as archive:
        for part, count, seed in (("train", 40, 1), ("test", 6, 2)):
            for index, image in enumerate(blobs(count, seed=seed)):
                member = tarfile.TarInfo(f"{part}/healthy/{index:03}.png")
                member.size = len(data := png(image))
                archive.addfile(member, io.BytesIO(data))
    volume = (1000 * blobs(30, 20, 26, seed=3)).permute(2, 1, 0).numpy()  # x, y, z
    (path / "head.nii.gz").write_bytes(gzip.compress(nifti(volume)))
    kspace = acquisition.measure(blobs(1, seed=4), 4, 0.001, 0)[0]
    centred = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(torch.fft.ifft2(kspace), dim=(1, 2))), dim=(1, 2))
    np.save(path / "kspace.npy", centred.numpy())
    return path


def tiny(folder: Path | None = None, **fields: Any) -> MriRecipe:
    small = {
        "size": (SIDE, SIDE),
        "coils": 6,
        "shots": 0,
        "valid_slices": 8,
        "test_slices": 0,
        "steps": 30,
        "device": "cpu",
    }
    data = {"data": (str(folder),)} if folder else {}
    return dataclasses.replace(recipes.find("tiny_mri"), **{**small, **data, **fields})  # type: ignore[return-value]


# files


def test_a_folder_is_read(folder: Path) -> None:
    images = files.read(folder, SIDE, SIDE)
    assert images.train.shape == (40, SIDE, SIDE)
    assert (images.train[:5] - blobs(40, seed=1)[:5]).abs().max() < 0.01
    assert {name: planes.shape for name, planes in images.volumes.items()} == {"head": (2, SIDE, SIDE)}
    assert images.kspace is not None
    magnitude = torch.fft.ifft2(images.kspace).abs().square().sum(0).sqrt()
    assert magnitude.max() == pytest.approx(1)
    assert (magnitude - blobs(1, seed=4)[0]).abs().max() < 0.02  # upright, its middle in the middle


@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_volumes_are_read(order: str) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    assert torch.equal(files.read_nifti(nifti(values, order)), torch.arange(24.0).reshape(2, 3, 4))
    assert files.read_nifti(gzip.compress(nifti(values, order, slope=2.0)))[1, 2, 3] == 47
    for broken in (nifti(values, order)[:-1], b"x" * 400, b"short"):
        with pytest.raises(ValueError, match=r"cut short|no NIfTI|less than the header"):
            files.read_nifti(broken)


def test_images_are_fitted_whole() -> None:
    image = torch.zeros(10, 20)
    image[:, 0] = image[:, -1] = 5.0
    placed = files.fit(image, 20, 20)
    assert placed[:5].sum() == placed[15:].sum() == 0
    assert torch.equal(placed[5:15], image / 5)
    assert files.fit(image, 5, 10).shape == (5, 10)


def test_images_that_fill_their_place_leave_no_zeros() -> None:
    image = torch.arange(1.0, 22.0).expand(10, 21)
    assert torch.equal(files.fit(image, 10, 10, fill=True), torch.arange(7.0, 17.0).expand(10, 10) / 16)
    assert files.fit(image, 10, 42, fill=True).min() > 0
    assert torch.equal(files.fit(image, 10, 21, fill=True), files.fit(image, 10, 21))


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--data: .*is no folder; allowed: a folder with an archive"):
        files.read(tmp_path / "missing", SIDE, SIDE)
    with pytest.raises(OptionError, match="holds 0 train and 0 test slices"):
        files.read(tmp_path, SIDE, SIDE)
    for name in ("slices.tar.xz", "head.nii.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    np.save(tmp_path / "kspace.npy", np.zeros((3, 4)))
    with pytest.raises(OptionError, match=r"kspace.npy: holds float64 \[3, 4\], not finite complex"):
        files.read(tmp_path, SIDE, SIDE)
    kspace = np.load(folder / "kspace.npy")
    thinned = kspace * (np.random.default_rng(0).random(kspace.shape[1:]) < 0.3)
    np.save(tmp_path / "kspace.npy", thinned)
    with pytest.raises(OptionError, match=r"--size, --data: .* a measured k-space with samples at \d\d% of its places"):
        MriProblem(tiny(tmp_path))
    MriProblem(tiny(tmp_path, size=(SIDE, SIDE - 2)))  # where it is not used
    with pytest.raises(OptionError, match="--shots, --valid-slices: 40 and 8 are given; there are 40"):
        MriProblem(tiny(folder, shots=40))
    with pytest.raises(OptionError, match="--data: 0 folders are given"):
        MriProblem(tiny(data=()))


# acquisition


def test_a_measurement_is_the_transform_of_coil_images() -> None:
    truth = blobs(3)
    kspace = acquisition.measure(truth, 5, 0.0, seed=7)
    assert kspace.shape == (3, 5, SIDE, SIDE)
    root = torch.fft.ifft2(kspace).abs().square().sum(1).sqrt()
    torch.testing.assert_close(root, truth, atol=1e-5, rtol=0)
    assert torch.equal(kspace, acquisition.measure(truth, 5, 0.0, seed=7))
    noise = torch.fft.ifft2(acquisition.measure(truth, 5, 0.1, seed=7) - kspace)
    assert noise.real.std() == pytest.approx(0.1, rel=0.05)
    assert noise.imag.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("pattern", ["random", "equispaced"])
@pytest.mark.parametrize("acceleration", [1, 2, 4, 8])
def test_masks_have_their_centre_and_their_columns(pattern: Any, acceleration: int) -> None:
    mask = acquisition.mask(224, acceleration, pattern, seed=3)
    assert mask.sum() == 224 // acceleration
    centre = acquisition.centre_columns(224, acceleration)
    assert torch.fft.fftshift(mask)[112 - centre // 2 : 112 + centre // 2].all()
    assert torch.equal(mask, acquisition.mask(224, acceleration, pattern, seed=3))
    if acceleration > 1:
        assert not torch.equal(mask, acquisition.mask(224, acceleration, pattern, seed=4))
    if pattern == "equispaced" and acceleration > 1:
        outside = torch.fft.fftshift(mask)[112 + (centre + 1) // 2 :].nonzero()[:, 0].diff()
        assert outside.max() - outside.min() <= 1


# SENSE


def measured(count: int = 3, noise: float = 0.0, acceleration: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Truth, masked k-space, exact maps with the phase of the image, mask."""
    truth = blobs(count)
    generator = torch.Generator().manual_seed(5)
    maps = acquisition.sensitivities(count, 6, SIDE, SIDE, generator)
    maps = maps * acquisition.smooth_phase(count, SIDE, SIDE, generator)
    mask = acquisition.mask(SIDE, acceleration, "equispaced", 0)
    return truth, acquisition.measure(truth, 6, noise, 5) * mask, maps, mask


def test_sense_solves_its_equations() -> None:
    _, kspace, maps, mask = measured(noise=0.02)
    found = sense(kspace, maps, mask, 0.01, 60)
    pushed = combine(torch.fft.ifft2(torch.fft.fft2(maps * found[:, None]) * mask), maps) + 0.01 * found
    assert (pushed - zero_filled(kspace, maps)).abs().max() < 1e-5
    assert (sense(kspace, maps, mask, 0.01, 3) - found).abs().max() > 1e-4


def test_sense_unfolds_what_zero_filling_leaves() -> None:
    truth, kspace, maps, mask = measured()
    assert psnr_db(sense(kspace, maps, mask, 0.0, 60).abs(), truth).min() > 40
    assert psnr_db(zero_filled(kspace, maps).abs(), truth).max() < 30


def test_maps_from_the_centre_are_those_of_the_coils() -> None:
    truth, generator = blobs(2, 96, 96), torch.Generator().manual_seed(5)
    maps = acquisition.sensitivities(2, 6, 96, 96, generator) * acquisition.smooth_phase(2, 96, 96, generator)
    found = coil_maps(acquisition.measure(truth, 6, 0.0, 5), 2)
    torch.testing.assert_close(found.abs().square().sum(1), torch.ones(2, 96, 96))
    agreement = combine(maps, found).abs()[truth > 0.5]
    assert agreement.median() > 0.99


# models


@pytest.mark.parametrize("size", [(224, 224), (230, 180), (12, 10)])
def test_monarch_sense_starts_as_sense(size: tuple[int, int]) -> None:
    image = torch.randn(2, *size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    model = MonarchSense(*size)
    found, exact = model(image), image.to(torch.complex128).abs()
    plain = torch.fft.ifft2(torch.fft.fft2(image)).abs()
    assert (found - exact).abs().max() <= 4 * (plain - exact).abs().max()
    assert len([m for m in model.modules() if isinstance(m, sl.StructuredLinear)]) == 2
    model(image).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_two_axes_have_transforms_of_their_own() -> None:
    model = MonarchSense(8, 12)
    with torch.no_grad():
        for parameter in model.along_height.parameters():
            parameter.mul_(2)
    assert torch.allclose(model(torch.ones(1, 8, 12, dtype=torch.complex64)), torch.full((1, 8, 12), 4.0), atol=1e-5)
    with pytest.raises(ValueError, match="length=13"):
        MonarchSense(8, 13)


def test_the_unet_starts_as_its_input_and_takes_any_size() -> None:
    model = UNet(4, 3)
    image = torch.randn(2, 23, 18, dtype=torch.complex64)
    assert torch.equal(model(image), image.abs())
    torch.nn.init.ones_(model.last.weight)
    assert model(image).shape == (2, 23, 18)
    assert not torch.equal(model(image), image.abs())


# metrics


@pytest.mark.parametrize("shape", [(32, 40), (7, 7)])
def test_metrics_are_those_of_scikit_image(shape: tuple[int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, *shape, generator=generator)
    found = truth + 0.1 * torch.randn(3, *shape, generator=generator)
    pairs = list(zip(found.numpy(), truth.numpy(), strict=True))
    theirs = [metrics.structural_similarity(t, f, data_range=1.0) for f, t in pairs]
    assert ssim(found, truth).tolist() == pytest.approx(theirs, rel=1e-5)
    theirs = [metrics.peak_signal_noise_ratio(t, f, data_range=1.0) for f, t in pairs]
    assert psnr_db(found, truth).tolist() == pytest.approx(theirs, rel=1e-5)
    theirs = [metrics.structural_similarity(t, f, data_range=2.0) for f, t in pairs]
    assert ssim(found, truth, 2.0).tolist() == pytest.approx(theirs, rel=1e-5)


def test_images_below_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="smaller than a window of 7x7"):
        ssim(torch.zeros(1, 6, 9), torch.zeros(1, 6, 9))


# recipes and runs


BAD = [
    ({"size": ["24"]}, "--size: 24 is given; allowed: rows and columns"),
    ({"size": ["24", "13"]}, "--size: 13 is prime; allowed for monarch_sense"),
    ({"acceleration": "12"}, "--acceleration: 12x leaves 2 of 24 columns, and the centre has 4; allowed: 1 to 6"),
    ({"structure": "monarch"}, "--structure: monarch is given; allowed: dense"),
    ({"model": "unet", "size": ["16", "16"]}, "--size: 16 16 is given; allowed for unet: one side of 17 or more"),
    ({"dtype": "bfloat16"}, "--dtype: bfloat16 is given; allowed for monarch_sense: float32"),
    ({"noise": "-1"}, "--noise: -1.0 is given; allowed: 0 to 1000"),
]


@pytest.mark.parametrize(
    ("texts", "message"), BAD, ids=[next(iter(texts)) + str(i) for i, (texts, _) in enumerate(BAD)]
)
def test_fields_that_do_not_fit_are_refused(texts: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        override(tiny(), texts)
    assert message in str(caught.value)


def test_a_run_beats_sense_and_reports_everything(folder: Path, tmp_path: Path) -> None:
    options = {"size": [str(SIDE)] * 2, "coils": ["6"], "shots": ["0"], "test_slices": ["0"], "noise": ["0.05"]}
    words = [word for name, values in options.items() for word in ("--" + name.replace("_", "-"), *values)]
    status = cli.main(
        ["train", "tiny_mri", "--data", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu", *words]
    )
    assert status == 0
    (record,) = records.read(tmp_path / "run" / "record.json")
    metrics = {name: value for name, value in record["metrics"].items() if value is not None}
    for part in ("", "head_", "measured_"):
        for method in ("", "sense_", "scaled_sense_", "zero_filled_"):
            assert 5 < metrics[f"test_{part}{method}psnr_db"] < 60
            assert 0 < metrics[f"test_{part}{method}ssim"] < 1
    assert metrics["test_psnr_db"] > metrics["test_sense_psnr_db"]
    assert metrics["test_ssim"] > metrics["test_sense_ssim"]
    assert record["config"]["about"]["mri"]["slices"] == {"train": 32, "valid": 8, "test": 6, "head": 2}
    if (tmp_path / "run" / "picture.png").exists():
        assert (tmp_path / "run" / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_a_measurement_does_not_depend_on_the_model(folder: Path) -> None:
    one, other = MriProblem(tiny(folder)), MriProblem(tiny(folder, model="unet"))
    for problem in (one, other):
        problem.to(torch.device("cpu"))
    assert torch.equal(one.parts["test"].sense, other.parts["test"].sense)
    assert torch.equal(one.batch(3)[0].abs(), one.batch(3)[0].abs())
    assert torch.equal(one.batch(3)[1], other.batch(3)[1])
    assert not torch.equal(one.batch(3)[0], other.batch(3)[0])  # the U-Net corrects zero-filled images
    seen = torch.cat([one.batch(step)[1] for step in range(4)])
    assert len(seen.flatten(1).unique(dim=0)) == 32


def test_few_slices_are_the_first_of_more(folder: Path) -> None:
    few, more = MriProblem(tiny(folder, shots=3)), MriProblem(tiny(folder, shots=9))
    assert torch.equal(few.truths["train"], more.truths["train"][:3])
    assert torch.equal(few.truths["valid"], more.truths["valid"])
    assert few.about != more.about
    few.to(torch.device("cpu"))
    assert few.batch(0)[1].shape == (8, SIDE, SIDE)


# claims


def a_run(name: str, psnr: float) -> Any:
    metrics = {"test_psnr_db": psnr, "test_ssim": psnr / 50, "test_scaled_sense_psnr_db": 30.0,
               "test_scaled_sense_ssim": 0.6,
               "model_params": 7 if name.startswith("monarch") else 1400}  # fmt: skip
    where = {"kind": "train", "created": "2026-01-01T00:00:00+00:00", "command": "", "seed": 0, "commit": None}
    rest = {"device": {"type": "cpu"}, "versions": {}, "config": {}, "status": "ok", "error": None}
    return {"name": name, "metrics": metrics, **where, **rest}


def test_claims_follow_from_records(tmp_path: Path) -> None:
    module, path = script("claims_mri"), tmp_path / "records.json"
    paths = [tmp_path / "older.json", path]
    assert module.above_sense((2,), paths) is module.few_shot(paths) is module.smaller(paths) is None
    few = [a_run(f"{method}-shots{n}-4x-s{s}", 32 - n / 20 if method == "monarch_sense" else 28 + n / 20)
           for method in ("monarch_sense", "unet") for n in (1, 5, 20, 100) for s in range(3)]  # fmt: skip
    full = [
        a_run("unet-4x-s0", 31.0),
        *(a_run(f"monarch_sense-{a}x-s{s}", 31.0 + s / 10) for a in (2, 4) for s in range(3)),
    ]
    records.write(path, [*few, *full])
    records.write(paths[0], [a_run("monarch_sense-2x-s0", 1.0)])
    said, verdict = module.above_sense((2, 4), paths)
    assert verdict
    assert said.startswith("2x: 31.10 ± 0.10 over 30.00 dB, SSIM 0.622 ± 0.002 over 0.600; 4x")
    assert said.endswith("(3 seeds, on a CPU)")
    said, verdict = module.few_shot(paths)
    assert verdict
    assert "1: 31.95 / 0.639 beside 28.05 / 0.561" in said
    assert module.smaller(paths) == ("100 times fewer (7 complex, 1,400 real)", True)
    records.write(path, [*few, *full[:-1], a_run("monarch_sense-4x-s2", 29.9)])
    assert module.above_sense((2, 4), paths)[1] is False


@pytest.mark.slow
@pytest.mark.skipif(files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} names no folder of real images")
def test_real_slices_are_reconstructed_better_than_by_sense(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipes.find("tiny_mri"), device="cpu")
    from structlin.problems import train

    metrics = train(recipe, tmp_path, "test", lambda _: None)["metrics"]  # type: ignore[arg-type]
    for name in ("psnr_db", "ssim"):
        ours, theirs = metrics[f"test_{name}"], metrics[f"test_sense_{name}"]
        assert ours is not None
        assert theirs is not None
        assert ours > theirs
