"""Images come out of every kind of place as they went in, a batch at a time; what is none is refused."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastcfg.jobs
from fastcfg.errors import Error
from fastcfg.metrics import Images, from_arrays, open_images

SPEC = """
checkpoint = "fashion-mnist"
labels = [3, 7, 7]
scales = [1.0, 2.5]
steps = 2
unit_size = 4
batch = 2
dtype = "fp32"
engine = "reference"
"""


def pictures(n: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 5, 6, channels), dtype=np.uint8)


def everything(images: Images, batch: int = 3) -> np.ndarray:
    parts = list(images.read(batch))
    assert all(len(part) == batch for part in parts[:-1])
    return np.concatenate(parts)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_in_adms_layout(save: object, tmp_path: Path) -> None:
    path, images, labels = tmp_path / "x.npz", pictures(), np.arange(7, dtype=np.int32)
    save(path, images, labels)  # type: ignore[operator]
    found = open_images(path)
    assert found.count == 7
    assert np.array_equal(found.labels, labels)
    assert np.array_equal(everything(found), images)
    assert np.array_equal(everything(found, batch=100), images)


def test_npz_without_labels_and_with_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures())
    assert open_images(tmp_path / "a.npz").labels is None
    np.savez(tmp_path / "b.npz", images=pictures(), labels=np.arange(7))
    assert open_images(tmp_path / "b.npz").labels.tolist() == list(range(7))


def test_npz_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of a file asks the archive for that many bytes and no more."""
    np.savez(tmp_path / "x.npz", pictures(100))
    asked = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or read(self, n))
    next(iter(open_images(tmp_path / "x.npz").read(4)))
    assert max(asked) == 4 * 5 * 6 * 3
    assert min(asked) >= 0


def damage(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    return path


def test_bad_npz_is_refused(tmp_path: Path) -> None:
    def saved(name: str, **arrays: np.ndarray) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    cut = saved("cut.npz", arr_0=pictures())
    cut.write_bytes(cut.read_bytes()[:-50])
    (tmp_path / "text.npz").write_text("hello")
    objects = tmp_path / "objects.npz"
    np.savez(objects, arr_0=pictures(), arr_1=np.array([{}] * 7, dtype=object))
    cases = {
        cut: "cannot read",
        tmp_path / "text.npz": "cannot read",
        objects: "cannot read .*[Oo]bject",
        saved("other.npz", x=pictures()): r"must hold arr_0, .* but holds \['x.npy'\]",
        saved("floats.npz", arr_0=np.zeros((2, 5, 5, 3))): r"uint8 \[N, H, W, C\], got float64",
        saved("flat.npz", arr_0=np.zeros((2, 5), np.uint8)): r"got uint8 \[2, 5\]",
        saved("labels.npz", arr_0=pictures(), arr_1=np.arange(6)): r"whole numbers \[7\], got int64 \[6\]",
        saved("float-labels.npz", arr_0=pictures(), arr_1=np.zeros(7)): "got float64",
        saved("scales.npz", arr_0=pictures(), arr_2=np.ones(6)): r"arr_2 must be scales, numbers \[7\], got float64 \[6\]",
        saved("text-scales.npz", arr_0=pictures(), arr_2=np.array(["a"] * 7)): r"got <U1 \[7\]",
    }
    for path, message in cases.items():
        with pytest.raises(Error, match=message):
            open_images(path)


def test_fewer_pixels_than_promised_are_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (9, 5, 6, 3)})
        file.write(pictures(7).tobytes())
    with pytest.raises(Error, match="cannot read"):
        everything(open_images(tmp_path / "x.npz"))


def test_damaged_pixels_are_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pictures(100))
    images = open_images(damage(tmp_path / "x.npz", 8000))
    with pytest.raises(Error, match=r"cannot read .*CRC"):
        everything(images)


def test_folder_of_images(tmp_path: Path) -> None:
    """Sorted by path; labels are the folders' numbers; PNG comes back bit for bit."""
    images = pictures(6)
    for i, pixels in enumerate(images):
        (tmp_path / str(i // 2 * 10)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / str(i // 2 * 10) / f"{i:03}.png")
    found = open_images(tmp_path)
    assert found.labels.tolist() == [0, 0, 10, 10, 20, 20]
    assert np.array_equal(everything(found), images)
    assert open_images(tmp_path / "20").labels is None, "a folder that is named is no class"
    (tmp_path / "10").rename(tmp_path / "ten")
    assert open_images(tmp_path).labels is None


def test_folder_with_grey_images(tmp_path: Path) -> None:
    """All grey: one channel. Grey among colours: the same grey in three. Colours among grey: refused."""
    grey = pictures(2, channels=1)
    for i in range(2):
        Image.fromarray(grey[i, :, :, 0]).save(tmp_path / f"b{i}.png")
    assert np.array_equal(everything(open_images(tmp_path)), grey)
    Image.fromarray(pictures()[0]).save(tmp_path / "a.png")
    assert np.array_equal(everything(open_images(tmp_path))[1:], grey.repeat(3, axis=3))
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    with pytest.raises(Error, match=r"c.png is \[5, 6, 3\], but the first image is \[5, 6, 1\]"):
        everything(open_images(tmp_path))


def test_bad_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(Error, match=r"no images at .*nowhere: want an \.npz"):
        open_images(tmp_path / "nowhere")
    for split in ("", ":test"):
        with pytest.raises(Error, match=r"cannot reach .*: File name too long"):
            open_images(f"{tmp_path / ('a' * 300)}{split}")
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(Error, match=r"cannot read the image .*x\.png"):
        everything(open_images(tmp_path))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(Error, match="more than 8 bits"):
        everything(open_images(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(Error, match=r"cannot read the image .*x\.png: .*exceeds limit"):
        everything(open_images(tmp_path))


def _idx(folder: Path, prefix: str, n: int) -> None:
    pixels = np.full((n, 5, 5), n, np.uint8)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">2xBB3I", 8, 3, n, 5, 5) + pixels.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2xBBI", 8, 1, n) + bytes(range(n)))


def test_idx_files_by_split(tmp_path: Path) -> None:
    for prefix, n in (("train", 4), ("t10k", 3)):
        _idx(tmp_path, prefix, n)
    test = open_images(f"{tmp_path}:test")
    assert everything(test).tolist() == np.full((3, 5, 5, 1), 3).tolist()
    assert test.labels.tolist() == [0, 1, 2]
    assert open_images(f"{tmp_path}:train").count == 4
    with pytest.raises(Error, match=f"name the split, {tmp_path}:test"):
        open_images(tmp_path)


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pictures())
    with pytest.raises(Error, match="only a folder of IDX files has splits"):
        open_images(f"{tmp_path / 'x.npz'}:test")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "spec.toml").write_text(SPEC)
    fastcfg.jobs.run(folder / "spec.toml", folder / "out")
    return folder / "out"


def test_job_by_scale(job: Path) -> None:
    """Each label at each scale, in turn: every other sample is of one scale, across units."""
    pixels = fastcfg.jobs.open(job)[:].image
    for scale, rows in ((1.0, pixels[::2]), (2.5, pixels[1::2])):
        found = open_images(job, scale)
        assert found.labels.tolist() == [3, 7, 7]
        assert np.array_equal(everything(found, batch=2), rows)


def test_job_needs_a_scale_that_it_has(job: Path) -> None:
    with pytest.raises(Error, match=r"scales 1, 2\.5: pick one with --scale .*REFERENCE"):
        open_images(job)
    with pytest.raises(Error, match=r"no samples at scale 2, only at 1, 2\.5"):
        open_images(job, 2.0)


@pytest.mark.parametrize("format", ["adm-npz", "png"])
def test_export_of_a_job_is_judged_by_scale_as_the_job_is(format: str, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz" if format == "adm-npz" else tmp_path / "out"
    fastcfg.jobs.export(job, format, out, progress=False)
    for scale in (1.0, 2.5):
        found, wanted = open_images(out, scale), open_images(job, scale)
        assert found.count == 3
        assert np.array_equal(found.labels, wanted.labels)
        assert np.array_equal(everything(found, batch=2), everything(wanted, batch=2))
        assert found.sha256() == wanted.sha256()
    with pytest.raises(Error, match=r"scales 1, 2\.5: pick one with --scale .*REFERENCE"):
        open_images(out)
    with pytest.raises(Error, match=r"no samples at scale 2, only at 1, 2\.5"):
        open_images(out, 2.0)


def test_npz_by_scale_comes_in_full_batches(tmp_path: Path) -> None:
    """Few of the rows, here and there: as many at once as are asked for, in order."""
    images, scales = pictures(40), np.random.default_rng(0).choice([1.0, 1.5, 3.0], 40)
    np.savez(tmp_path / "x.npz", images, np.arange(40), scales)
    found = open_images(tmp_path / "x.npz", 1.5)
    assert np.array_equal(everything(found, batch=4), images[scales == 1.5])
    assert found.labels.tolist() == np.flatnonzero(scales == 1.5).tolist()


def test_one_scale_need_not_be_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pictures(), np.arange(7), np.full(7, 3))
    assert np.array_equal(everything(open_images(tmp_path / "x.npz")), pictures())
    assert open_images(tmp_path / "x.npz", 3.0).count == 7


def test_images_beside_folders_of_scales_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scale-1.5" / "3").mkdir(parents=True)
    for path in ("scale-1.5/3/0.png", "stray.png"):
        Image.fromarray(pictures()[0]).save(tmp_path / path)
    with pytest.raises(Error, match=r"mixes images in scale-S folders with others, such as .*/stray\.png"):
        open_images(tmp_path)


def test_scale_of_anything_else_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pictures())
    _idx(tmp_path, "t10k", 3)
    Image.fromarray(pictures()[0]).save(tmp_path / "x.png")
    for where in (tmp_path / "x.npz", tmp_path, f"{tmp_path}:test"):
        with pytest.raises(Error, match=f"--scale picks samples of a job's folder, .* and {where} is none"):
            open_images(where, 2.0)


def test_sha256_is_that_of_the_pixels_wherever_they_are(tmp_path: Path) -> None:
    images = pictures()
    np.savez(tmp_path / "x.npz", images, np.arange(7))
    assert open_images(tmp_path / "x.npz").sha256() == from_arrays(images).sha256()
    assert from_arrays(images).sha256() != from_arrays(images[:, ::-1]).sha256()
    assert from_arrays(images).sha256() != from_arrays(images.reshape(7, 6, 5, 3)).sha256()
