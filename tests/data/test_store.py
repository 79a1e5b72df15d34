"""The HDF5 store: what goes in comes out; files that are damaged or lie are refused before anything is allocated."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from refusal import refused

from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import (
    ImageSet,
    iterate_store,
    load_folder,
    load_points,
    load_store,
    pack_folder,
    store,
    store_splits,
    write_store,
)
from hmg_gpu.data.sets import padded_shape


def small_set(split: str = "train", dtype: torch.dtype = torch.uint8, count: int = 5, masks: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(3, 12, (count, 2), generator=generator)
    height, width = padded_shape(sizes)
    inside = (torch.arange(height)[:, None] < sizes[:, 0, None, None]) & (torch.arange(width) < sizes[:, 1, None, None])
    images = torch.randint(0, 256, (count, height, width), generator=generator).to(dtype) * inside
    points = torch.tensor([[0, 0, 0], [0, 2, 1], [3, 1, 1], [4, 2, 2]])
    return ImageSet(
        [f"im_{i}.x" for i in range(count)],
        images,
        sizes,
        points,
        images > 128 if masks else None,
        3.5,
        2.5,
        "Sea",
        split,
    )


def assert_equal(one: ImageSet, other: ImageSet) -> None:
    for key in ("images", "sizes", "points"):
        assert torch.equal(getattr(one, key), getattr(other, key)), key
        assert getattr(one, key).dtype == getattr(other, key).dtype
    assert (one.masks is None) == (other.masks is None)
    assert one.masks is None or torch.equal(one.masks, other.masks)
    for key in ("names", "mean", "std", "dataset", "split"):
        assert getattr(one, key) == getattr(other, key), key


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale", "stored"),
    [(torch.uint8, 1, "uint8"), (torch.float32, 257, "uint16"), (torch.float32, -0.3, "float32")],
)
def test_round_trip(tmp_path, dtype, scale, stored, masks):
    train, test = small_set("train", dtype, masks=masks), small_set("", dtype, count=6, masks=masks)
    train.images, test.images = (train.images * scale).to(dtype), (test.images * scale).to(dtype)
    write_store(tmp_path / "s.h5", [train, test])
    assert_equal(load_store(tmp_path / "s.h5", "train"), train)
    assert_equal(load_store(tmp_path / "s.h5", "all"), test)  # a set without split
    assert store_splits(tmp_path / "s.h5") == {"all": ["masks_centroid"], "train": ["masks_centroid"]}
    with h5py.File(tmp_path / "s.h5") as file:  # other tools read it as it is
        assert file["train/pixels"].dtype == stored
        assert file["train/pixels"].shape == (int(train.sizes.prod(1).sum()),)


def test_ranges_equal_subsets(tmp_path):
    train = small_set()
    write_store(tmp_path / "s.h5", [train])
    assert_equal(load_store(tmp_path / "s.h5", "train", start=1, stop=4), train.subset([1, 2, 3]))
    assert_equal(load_store(tmp_path / "s.h5", "train", start=-1), train.subset([4]))
    parts = list(iterate_store(tmp_path / "s.h5", "train", batch=2))
    assert [part.names for part in parts] == [train.names[:2], train.names[2:4], train.names[4:]]
    for part, indices in zip(parts, ([0, 1], [2, 3], [4]), strict=True):
        assert_equal(part, train.subset(indices))
    refused(lambda: load_store(tmp_path / "s.h5", "train", start=5), "images 5 to None of 5")
    refused(lambda: next(iterate_store(tmp_path / "s.h5", "train", batch=0)), "at least 1")


def test_iterating_holds_one_batch(tmp_path):
    """Peak memory does not follow the number of images."""
    images = torch.zeros(200, 128, 128, dtype=torch.uint8)
    images[:, 3, 4] = torch.arange(200).to(torch.uint8)
    sizes = torch.full((200, 2), 128)
    names = [f"{i:03}" for i in range(200)]
    whole = ImageSet(names, images, sizes, torch.tensor([[199, 3, 4]]), split="train")
    write_store(tmp_path / "s.h5", [whole])
    tracemalloc.start()
    firsts = [int(part.images[0, 3, 4]) for part in iterate_store(tmp_path / "s.h5", "train", batch=4)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert firsts == list(range(0, 200, 4))
    assert peak < images.nbytes / 4


def test_both_kinds_of_points_from_a_folder(data_root, tmp_path):
    root = data_root / "NUAA-SIRST"
    pack_folder(root, tmp_path / "nuaa.h5")
    assert store_splits(tmp_path / "nuaa.h5") == {
        split: ["masks_centroid", "masks_coarse"] for split in ("test", "train")
    }
    for split in ("train", "test"):
        one = load_folder(root, split)
        assert_equal(load_store(tmp_path / "nuaa.h5", split), one)
        one.points = load_points(root / "masks_coarse", one.names, one.sizes)
        assert_equal(load_store(tmp_path / "nuaa.h5", split, points="masks_coarse"), one)


def test_a_split_in_parts_is_the_split_in_one(tmp_path):
    """Uneven parts, one of them without points, another split between files of its own."""
    one, other = small_set(), small_set("test")
    write_store(tmp_path / "one.h5", [one, other])
    cut = (one.subset(range(0, 1)), one.subset(range(1, 3)), one.subset(range(3, 5)))
    assert len(cut[1].points) == 0
    write_store(tmp_path / "parts.h5", iter([*cut, other]))
    for split in ("train", "test"):
        assert_equal(load_store(tmp_path / "parts.h5", split), load_store(tmp_path / "one.h5", split))
    different = cut[1]
    different.mean = 7.0
    refused(lambda: write_store(tmp_path / "no.h5", [cut[0], different]), "'train'", "differ", "make them alike")


def test_a_file_larger_than_what_is_held_is_written_from_a_generator(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def parts():
        for number in range(12):
            images = torch.randint(0, 256, (8, 256, 256), generator=generator, dtype=torch.uint8)
            sizes = torch.full((8, 2), 256)
            yield ImageSet([f"{number}_{i}" for i in range(8)], images, sizes, torch.zeros(0, 3, dtype=torch.int64))

    tracemalloc.start()
    write_store(tmp_path / "large.h5", parts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "large.h5").stat().st_size
    assert size > 12 * 8 * 256**2 and peak < size / 2
    assert sum(len(part) for part in iterate_store(tmp_path / "large.h5", "all", 10)) == 96


def test_writing_nothing_useful_is_refused_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "s.h5"
    write_store(path, [small_set()])
    before = path.read_bytes()
    refused(lambda: write_store(path, []), "s.h5", "no sets given")
    refused(lambda: write_store(path, [small_set().subset([])]), "'train' has no images")
    refused(lambda: write_store(path, [small_set(), small_set()]), "'train'", "image", "twice")
    others = [small_set(), small_set("test"), small_set()]
    refused(lambda: write_store(path, others), "'train' comes again after another")
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["s.h5"]
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(HMGError, match=r"folder.h5: cannot be written"):
        write_store(tmp_path / "folder.h5", [small_set()])


def test_the_same_set_gives_the_same_bytes(tmp_path):
    write_store(tmp_path / "a.h5", [small_set()])
    write_store(tmp_path / "b.h5", [small_set()])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_files_that_are_no_store(tmp_path):
    write_store(tmp_path / "s.h5", [small_set()])
    whole = (tmp_path / "s.h5").read_bytes()

    def load(data: bytes) -> Callable[[], ImageSet]:
        (tmp_path / "x.h5").write_bytes(data)
        return lambda: load_store(tmp_path / "x.h5", "train")

    refused(lambda: load_store(tmp_path / "none.h5", "train"), "none.h5: no such file")
    refused(load(b""), "x.h5: no hmg_gpu store")
    refused(load(b"text"), "x.h5: no hmg_gpu store", "pack_folder")
    refused(load(whole[512:]), "no hmg_gpu store")
    refused(load(whole[:-1]), "x.h5: damaged or cut short", "pack again")
    refused(load(whole + b"\0"), "damaged")
    refused(load(whole[:600]), "damaged")
    refused(load(whole.replace(b"store 1", b"store 9", 1)), "store version 9, this library reads 1")
    for where in range(0, len(whole), 97):  # every kind of place in the file
        refused(load(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :]), "x.h5")


def test_unknown_split_and_points(tmp_path):
    write_store(tmp_path / "s.h5", [small_set()], points="clicks")
    path = tmp_path / "s.h5"
    refused(lambda: load_store(path, "val"), "no split 'val'; it has train")
    refused(lambda: load_store(path, "train/points"), "no split")
    refused(lambda: load_store(path, "train"), "no points 'masks_centroid'", "it has clicks")
    assert len(load_store(path, "train", points="clicks").points) == 4
    assert len(load_store(path, "train", points=None).points) == 0


# ---- files that lie, with a checksum that fits


def forge(path: Path, change: Callable[[h5py.Group], None]) -> None:
    """Rewrite a store's first split by ``change`` and give it a fitting checksum."""
    with h5py.File(path, "r+") as file:
        change(file["train"])
    data = path.read_bytes()
    digest = hashlib.sha256(data[512:]).hexdigest()
    path.write_bytes(f"hmg_gpu store 1\nsha256 {digest}\n".encode().ljust(512, b"\n") + data[512:])


def replace(name: str, data: object = None, **options) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, data=data, **options)

    return change


def external(group: h5py.Group) -> None:
    del group["masks"]
    group["masks"] = h5py.ExternalLink("other.h5", "/x")


def elsewhere(group: h5py.Group) -> None:
    total = group["pixels"].shape
    del group["pixels"]
    group.create_dataset("pixels", total, np.uint8, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


BILLIONS = 3 * 10**9


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (replace("sizes", shape=(BILLIONS, 2), dtype=np.int64, chunks=(1000, 2)), "the file cannot hold"),
        (replace("sizes", shape=(10**7, 2), dtype=np.int64, chunks=(10**5, 2), compression="gzip"), "cannot hold"),
        (replace("names", shape=(BILLIONS,), dtype="S9", chunks=(1000,)), "shape (3000000000,), expected (5,)"),
        (replace("points/masks_centroid", shape=(BILLIONS, 3), dtype=np.int64, chunks=(1000, 3)), "cannot hold"),
        (replace("pixels", shape=(BILLIONS,), dtype=np.uint8, chunks=(1000,)), "shape (3000000000,)"),
        (replace("sizes", np.full((5, 2), 2**40)), "sizes: expected at least one image of 1 to"),
        (replace("sizes", np.full((5, 2), 2**13)), "pixels: shape"),
        (replace("sizes", np.full((5, 2), -3)), "sizes"),
        (replace("sizes", np.zeros((0, 2), np.int64)), "at least one image"),
        (replace("sizes", np.ones((5, 2))), "type float64, expected int64"),
        (replace("sizes", np.ones(10, np.int64)), "shape (10,)"),
        (lambda group: group.__delitem__("pixels"), "train/pixels: it is missing"),
        (lambda group: group.__delitem__("normalisation"), "train/normalisation: it is missing"),
        (replace("normalisation", np.array([1.0, 0.0])), "no mean and positive std"),
        (replace("normalisation", np.array([np.nan, 1.0])), "no mean and positive std"),
        (replace("names", np.array([b"a", b"b", b"c", b"d", b"../e"])), "not paths"),
        (replace("names", np.array([b"a", b"b", b"c", b"d", b"a"])), "different file stems"),
        (replace("names", np.array([b"a", b"b", b"c", b"d", b"\xff"])), "no UTF-8"),
        (replace("names", ["a", "b", "c", "d", "e"]), "expected text"),
        (replace("points/masks_centroid", np.array([[0, 0, 0], [5, 0, 0]])), "row 1, [5, 0, 0], lies outside"),
        (replace("points/masks_centroid", np.array([[0, 0, 99]])), "row 0, [0, 0, 99]"),
        (replace("points/masks_centroid", np.array([[-1, 0, 0]])), "row 0, [-1, 0, 0]"),
        (external, "train/masks: it is missing"),
        (elsewhere, "another file"),
    ],
)
def test_forged_stores_are_refused(tmp_path, change, part):
    path = tmp_path / "s.h5"
    write_store(path, [small_set()])
    forge(path, change)
    tracemalloc.start()
    refused(lambda: load_store(path, "train"), "s.h5", part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_forged_nan_and_padded_size(tmp_path, monkeypatch):
    one = small_set("train", torch.float32)
    one.images = one.images * 0.5
    path = tmp_path / "s.h5"
    write_store(path, [one])
    monkeypatch.setattr(store, "MAX_SET_BYTES", 4 * int(one.sizes.prod(1).sum()))
    refused(lambda: load_store(path, "train"), "s.h5", "read a shorter range")
    monkeypatch.undo()
    forge(path, lambda group: group["pixels"].__setitem__(3, np.nan))
    refused(lambda: load_store(path, "train"), "train/pixels: NaN or Inf")
