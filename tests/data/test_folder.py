"""Folders of images: the LESPS layout, images alone, and everything that can be missing or not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import refused

from hmg_gpu.data import (
    NORMALISATION,
    ImageSet,
    find_images,
    folder,
    load_folder,
    load_images,
    load_points,
    read_image,
    read_mask,
    split_names,
)

SIZES = {"a": (6, 9), "b.v2": (8, 5), "c": (7, 7)}
TRAIN = ["c", "a"]


def grey(name: str) -> np.ndarray:
    height, width = SIZES[name]
    return (np.arange(height * width).reshape(height, width) + 10 * len(name)).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three images of three sizes and types; the point of each at (1, 2), its mask around it."""
    root = tmp_path / "SEA"
    for name, suffix in zip(SIZES, ("png", "bmp", "tif"), strict=True):
        save(root / "images" / f"{name}.{suffix}", grey(name))
        point, mask = np.zeros(SIZES[name], np.uint8), np.zeros(SIZES[name], np.uint8)
        point[1, 2] = 255
        mask[0:3, 1:4] = 255
        save(root / "masks_centroid" / f"{name}.png", point)
        save(root / "masks" / f"{name}.png", mask)
    (root / "img_idx").mkdir()
    (root / "img_idx" / "train_SEA.txt").write_bytes(b"c\r\n\r\na\r\n")
    (root / "img_idx" / "test_SEA.txt").write_text("\ufeffb.v2.bmp\n", encoding="utf-8")
    return root


def test_a_split_in_one_padded_batch(root):
    train = load_folder(root, "train")
    assert (train.names, train.dataset, train.split, len(train)) == (TRAIN, "SEA", "train", 2)
    assert train.images.shape == (2, 7, 16) and train.images.dtype == torch.uint8
    assert train.sizes.tolist() == [[7, 7], [6, 9]]
    np.testing.assert_array_equal(train.images[0, :, :7], grey("c"))
    np.testing.assert_array_equal(train.images[1, :6, :9], grey("a"))
    assert not train.images[0, :, 7:].any() and not train.images[1, 6:].any() and not train.images[1, :, 9:].any()
    assert train.points.tolist() == [[0, 1, 2], [1, 1, 2]]
    assert train.masks.dtype == torch.bool and train.masks.sum((1, 2)).tolist() == [9, 9]
    assert train.masks[1, 0:3, 1:4].all()
    assert train.offsets.tolist() == [0, 1, 2]
    assert load_folder(root, "test").names == ["b.v2"]
    assert split_names(root) == ["test", "train"]


def test_own_normalisation_is_the_mean_over_images(root):
    train = load_folder(root, "train")
    assert train.mean == pytest.approx((grey("a").mean() + grey("c").mean()) / 2)
    assert train.std == pytest.approx((grey("a").std() + grey("c").std()) / 2)
    given = load_folder(root, "train", normalisation=(1.5, 2.0))
    assert (given.mean, given.std) == (1.5, 2.0)
    refused(lambda: load_folder(root, "train", normalisation=(1.0, 0.0)), "positive std")
    refused(lambda: load_folder(root, "train", normalisation=(float("nan"), 1.0)), "finite mean")
    for other in ({"mean": 1.0, "std": 2.0}, 5.0, (1.0, 2.0, 3.0), "SIRST3", ("a", "b")):
        refused(lambda other=other: load_folder(root, "train", normalisation=other), "finite mean", "values()")
    assert load_folder(root, "train", normalisation=np.array([1.5, 2.0])).std == 2.0


def test_normalisation_by_the_data_sets_name(root):
    assert load_folder(root, "train", dataset="IRSTD-1K").mean == NORMALISATION["IRSTD-1K"][0] == 87.4661865234375
    renamed = root.rename(root.parent / "copy_of_NUAA")
    (renamed / "img_idx" / "train_SEA.txt").rename(renamed / "img_idx" / "train_NUAA-SIRST.txt")
    train = load_folder(renamed, "train")  # the only list of this split names the set
    assert (train.dataset, train.mean, train.std) == ("NUAA-SIRST", 101.06385040283203, 34.619606018066406)


def test_constant_images_have_std_1(tmp_path):
    save(tmp_path / "a.png", np.full((4, 4), 7, np.uint8))
    assert (load_images(tmp_path).mean, load_images(tmp_path).std) == (7.0, 1.0)


def test_16_bit_among_8_bit_is_exact_in_float32(root):
    deep = np.array([[0, 1, 65535], [40000, 32769, 7]], np.uint16)
    save(root / "images" / "a.png", deep)
    for folder_name in ("masks", "masks_centroid"):
        save(root / folder_name / "a.png", np.zeros(deep.shape, np.uint8))
    train = load_folder(root, "train")
    assert train.images.dtype == torch.float32
    np.testing.assert_array_equal(train.images[1, :2, :3], deep)
    np.testing.assert_array_equal(train.images[0, :7, :7], grey("c"))


def test_hidden_files_are_no_images(root):
    """What other systems put beside images, and the parts of writes that were killed."""
    before = load_folder(root, "train").names, find_images(root / "images")
    for name in ("._a.png", ".a.12.part.png"):
        (root / "images" / name).write_bytes(b"no image")
        (root / "masks" / name).write_bytes(b"no image")
    assert (load_folder(root, "train").names, find_images(root / "images")) == before


def test_works_without_any_mask(root):
    for path in (root / "masks").iterdir():
        path.unlink()
    assert load_folder(root, "train").masks is None
    (root / "masks").rmdir()
    assert load_folder(root, "train").masks is None
    refused(lambda: load_folder(root, "train", masks=True), "masks", "no mask for any image of train_SEA.txt")


def test_one_mask_missing(root):
    (root / "masks" / "a.png").unlink()
    refused(
        lambda: load_folder(root, "train"), "some images have masks", "no a.png", "supply it or take a off the list"
    )
    assert load_folder(root, "test").masks is not None


def test_mask_of_another_size_names_the_file(root):
    save(root / "masks" / "a.png", np.zeros((12, 18), np.uint8))
    refused(lambda: load_folder(root, "train"), "masks/a.png", "12 x 18", "6 x 9", "never resized")


def test_missing_split_lists_those_there_are(root):
    refused(
        lambda: load_folder(root, "val"), "no lists for the split 'val'", "test_SEA.txt, train_SEA.txt", "val_SEA.txt"
    )
    refused(lambda: load_folder(root, "../train"), "'../train'")
    (root / "img_idx" / "train_SEA.txt").rename(root / "img_idx" / "train_X.txt")
    (root / "img_idx" / "train_Y.txt").write_text("a")
    refused(lambda: load_folder(root, "train"), "several lists", "train_X.txt, train_Y.txt", "Name the data set")
    assert load_folder(root, "train", dataset="Y").names == ["a"]


def test_missing_folders(root, tmp_path):
    refused(lambda: load_folder(tmp_path / "none", "train"), "none: no such folder")
    refused(lambda: load_images(tmp_path / "none"), "none: no such folder")
    refused(lambda: load_folder(tmp_path, "train"), "images: no such folder")
    refused(lambda: load_folder(root, "train", points="clicks"), "clicks", "masks, masks_centroid", "points=None")
    refused(lambda: split_names(tmp_path), "img_idx", "train_")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ("the list is empty",)),
        (b"\r\n \n", ("the list is empty",)),
        (b"c\na\nc\n", ("row 3", "c is already in row 1")),
        (b"a\na.png\n", ("row 2", "already in row 1")),
        (b"a\n../images/c\n", ("row 2", "'../images/c' is a path")),
        (b"..\\c\n", ("row 1", "is a path")),
        (b"/etc/passwd\n", ("row 1", "is a path")),
        (b"..\n", ("row 1", "is a path")),
        (b"a\nd\n", ("lists d", "images has no d.png", "supply it")),
        (b"\xff\xfea\0", ("cannot be read as UTF-8",)),
    ],
)
def test_lists_that_are_wrong(root, text, parts):
    (root / "img_idx" / "train_SEA.txt").write_bytes(text)
    refused(lambda: load_folder(root, "train"), "train_SEA.txt", *parts)


def test_two_images_of_one_stem(root):
    save(root / "images" / "a.bmp", grey("a"))
    refused(lambda: load_folder(root, "train"), "a.bmp and a.png", "keep one")
    refused(lambda: load_images(root / "images"), "a.png and", "a.bmp have the same stem")


def test_broken_image_among_good_ones(root):
    (root / "images" / "c.tif").write_bytes(b"")
    refused(lambda: load_folder(root, "train"), "c.tif", "empty")
    (root / "images" / "c.tif").unlink()
    save(root / "images" / "c.png", grey("c"))
    whole = (root / "images" / "c.png").read_bytes()
    (root / "images" / "c.png").write_bytes(whole[:-30])
    refused(lambda: load_folder(root, "train"), "c.png", "cannot be read")


def test_nan_in_an_image(root):
    values = np.ones(SIZES["c"], np.float32)
    values[2, 3] = np.nan
    save(root / "images" / "c.tif", values)
    refused(lambda: load_folder(root, "train"), "c.tif", "(y=2, x=3) is nan")


def test_too_large_a_set_is_refused_before_it_is_allocated(root, monkeypatch):
    monkeypatch.setattr(folder, "MAX_SET_BYTES", 2 * 7 * 16 - 1)
    monkeypatch.setattr(folder, "read_image", lambda path: pytest.fail("decoded"))
    refused(lambda: load_folder(root, "train"), "2 images padded to 7 x 16", "load fewer")


def test_points_from_any_format_or_arrays(root, tmp_path):
    (tmp_path / "p.csv").write_text("image,y,x\nc.tif,5,5\na.png,3,8\na.png,3,8\na.png,0,0\nb.v2.bmp,7,4\n")
    expected = [[0, 5, 5], [1, 0, 0], [1, 3, 8]]  # sorted, each once
    train = load_folder(root, "train", points=tmp_path / "p.csv")
    assert train.points.tolist() == expected and train.offsets.tolist() == [0, 1, 3]
    arrays = {"a": np.array([[3, 8], [0, 0]]), "c": np.array([[5, 5]]), "z": np.array([[99, 99]])}
    assert load_folder(root, "train", points=arrays).points.tolist() == expected
    assert load_points(arrays, train.names, train.sizes).tolist() == expected
    assert load_folder(root, "train", points=None).points.shape == (0, 3)
    arrays["a"] = np.array([[3, 8], [6, 0]])
    refused(lambda: load_folder(root, "train", points=arrays), "points of a, row 1", "(y=6, x=0)", "6 x 9")


def test_images_alone(root, tmp_path):
    (root / "images" / "notes.txt").write_text("not an image")
    seen = []
    loaded = load_images(root / "images", masks=root / "masks", progress=lambda *done: seen.append(done))
    assert (loaded.names, loaded.dataset, loaded.split) == (["a", "b.v2", "c"], "SEA", "")
    assert loaded.masks.sum().item() == 27 and len(loaded.points) == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert load_images(root / "images" / "a.png").names == ["a"]
    assert load_images(find_images(root / "images")[1:]).names == ["b.v2", "c"]
    refused(lambda: load_images([]), "no image files given")
    (tmp_path / "empty").mkdir()
    refused(lambda: load_images(tmp_path / "empty"), "empty: no image files", "*.png")
    refused(lambda: load_images(root / "images", masks=tmp_path / "empty"), "no mask is named like an image")


def test_labelme_json_beside_the_images(root):
    shapes = [{"shape_type": "point", "points": [[4.5, 2.5]]}]
    (root / "images" / "a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "a.png"}))
    assert load_images(root / "images", points=root / "images").points.tolist() == [[0, 2, 4]]


# ---- the set itself


def small_set() -> ImageSet:
    sizes = torch.tensor([[2, 3], [4, 1], [3, 3]])
    images = torch.arange(36, dtype=torch.uint8).reshape(3, 4, 3)
    points = torch.tensor([[0, 0, 0], [0, 1, 2], [2, 0, 1], [2, 2, 2]])
    return ImageSet(["a", "b", "c"], images, sizes, points, images % 2 == 0, 5.0, 2.0, "X", "train")


def test_widths_that_differ_are_padded_to_whole_vectors(tmp_path):
    """Images of 5 and 21 columns: 32 in memory, from files, from a store, and in a subset of both."""
    (tmp_path / "images").mkdir()
    for name, width in (("a", 5), ("b", 21)):
        Image.fromarray(np.full((7, width), 9, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    data = load_images(tmp_path / "images")
    assert data.images.shape == (2, 7, 32) and data.sizes.tolist() == [[7, 5], [7, 21]]
    assert int(data.images.sum()) == 9 * 7 * 26
    assert data.subset([1, 0]).images.shape == (2, 7, 32) and data.subset([1]).images.shape == (1, 7, 21)


def test_subset_renumbers_points_and_cuts_padding():
    part = small_set().subset([2, 0, 2])
    assert part.names == ["c", "a", "c"]
    assert part.images.shape == part.masks.shape == (3, 3, 3)
    assert part.points.tolist() == [[0, 0, 1], [0, 2, 2], [1, 0, 0], [1, 1, 2], [2, 0, 1], [2, 2, 2]]
    assert part.sizes.tolist() == [[3, 3], [2, 3], [3, 3]]
    assert torch.equal(part.images[1, :2], small_set().images[0, :2])
    assert (part.mean, part.std, part.dataset, part.split) == (5.0, 2.0, "X", "train")
    assert small_set().subset(torch.tensor([1])).points.shape == (0, 3)
    assert len(small_set().subset([])) == 0


def test_offsets_count_images_without_points():
    one = small_set()
    assert one.offsets.tolist() == [0, 2, 2, 4] and one.offsets is one.offsets
    assert one.to("cpu").offsets.tolist() == [0, 2, 2, 4]


# ---- real data


@pytest.mark.parametrize(
    ("name", "split", "images", "targets"),
    [
        ("NUAA-SIRST", "train", 213, 270),
        ("NUAA-SIRST", "test", 214, 263),
        ("NUDT-SIRST", "train", 663, 918),
        ("NUDT-SIRST", "test", 664, 945),
    ],
)
def test_the_papers_splits(data_root, name, split, images, targets):
    loaded = load_folder(data_root / name, split)
    assert (len(loaded), len(loaded.points)) == (images, targets)
    assert (loaded.mean, loaded.std) == NORMALISATION[name]
    assert loaded.images.dtype == torch.uint8 and loaded.masks.shape == loaded.images.shape
    coarse = load_points(data_root / name / "masks_coarse", loaded.names, loaded.sizes)
    assert len(coarse) == targets
    image, y, x = coarse.unbind(1)
    assert loaded.masks[image, y, x].all()  # coarse points lie on their target


def test_misc_111_has_its_images_size(data_root):
    """Copies in circulation have a mask of 400 x 592 there; this one must not."""
    image = read_image(data_root / "NUAA-SIRST" / "images" / "Misc_111.png")
    assert image.shape == (220, 325)
    assert read_mask(data_root / "NUAA-SIRST" / "masks" / "Misc_111.png", image.shape).any()


def test_nuaas_own_constants_are_not_the_fields(data_root):
    loaded = load_images(data_root / "NUAA-SIRST" / "images")
    assert (loaded.mean, loaded.std) == NORMALISATION["NUAA-SIRST"]
    paths = find_images(data_root / "NUAA-SIRST" / "images")
    modes = {Image.open(path).mode for path in paths}
    assert modes == {"L", "RGB", "RGBA", "P"}
    shuffled = folder._load([path.stem for path in paths], paths, None, None, None, None)
    assert (round(shuffled.mean, 2), round(shuffled.std, 2)) == (111.98, 27.63)
