"""Reading single image and mask files: modes, depths, codings and everything that can be wrong with a file."""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import binarise, read_image, read_mask, write_mask
from hmg_gpu.data.images import MAX_PIXELS, read_header

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 9)).astype(np.uint16)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_grey_pixels_come_out_the_same_from_every_8_bit_mode(tmp_path, mode):
    path = tmp_path / "a.png"
    Image.fromarray(GREY).convert(mode).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, GREY)
    assert read_header(path) == (7, 9, True)


def test_colour_gives_pillows_luminance(tmp_path):
    colour = Image.fromarray(RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    colour.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(colour.convert("L")))
    palette = colour.quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), np.asarray(palette.convert("L")))


def test_one_bit_image_has_0_and_255(tmp_path):
    Image.fromarray(GREY > 127).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), (GREY > 127) * 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_keeps_its_depth(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(DEEP).save(path)
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, DEEP)
    assert read_header(path) == (7, 9, False)


def tiff_bytes(order: str, bits: int, sample_format: int, pixels: np.ndarray) -> bytes:
    """A minimal TIFF, for the byte orders and sample formats that Pillow does not write."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    entries = [(256, 9), (257, 7), (258, bits), (259, 1), (262, 1), (273, 8)]  # size, depth, plain, black is 0, start
    entries += [(277, 1), (278, 7), (279, len(data)), (339, sample_format)]
    table = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        table += struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", 42, 8 + len(data)) + data + table + struct.pack(order + "I", 0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_in_both_byte_orders(tmp_path, order):
    (tmp_path / "a.tif").write_bytes(tiff_bytes(order, 16, 1, DEEP))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), DEEP)


def test_signed_16_bit_and_32_bit_integers(tmp_path):
    signed = (DEEP.astype(np.int32) - 32768).astype(np.int16)
    (tmp_path / "s.tif").write_bytes(tiff_bytes("<", 16, 2, signed))
    image = read_image(tmp_path / "s.tif")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, signed)
    Image.fromarray(DEEP.astype(np.int32)).save(tmp_path / "i.tif")
    assert read_image(tmp_path / "i.tif").dtype == np.uint16
    Image.fromarray(DEEP.astype(np.int32) + 2**25).save(tmp_path / "big.tif")
    refused(lambda: read_image(tmp_path / "big.tif"), "big.tif", "float32 exactly", "rescale")


def test_float_tiff_exact_and_finite_only(tmp_path):
    values = RNG.normal(size=(7, 9)).astype(np.float32) * 1e4
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), values)
    for bad in (np.nan, np.inf, -np.inf):
        values[3, 5] = bad
        Image.fromarray(values).save(tmp_path / "bad.tif")
        refused(lambda: read_image(tmp_path / "bad.tif"), "bad.tif", "(y=3, x=5)", str(bad), "replace NaN and Inf")


def test_16_bit_colour_is_refused_not_cut(tmp_path):
    rows = b"".join(b"\0" + bytes(3 * 6) for _ in range(2))
    (tmp_path / "a.png").write_bytes(png_bytes(3, 2, 16, 2, zlib.compress(rows)))
    refused(lambda: read_image(tmp_path / "a.png"), "a.png", "16-bit colour", "greyscale")


def test_broken_files_each_name_themselves_and_the_cure(tmp_path):
    Image.fromarray(GREY.repeat(30, 0).repeat(30, 1) ^ RNG.integers(0, 99, (210, 270), dtype=np.uint8)).save(
        tmp_path / "ok.png"
    )
    whole = (tmp_path / "ok.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "flip.png").write_bytes(whole[:60] + bytes(200) + whole[260:])
    (tmp_path / "folder.png").mkdir()
    refused(lambda: read_image(tmp_path / "cut.png"), "cut.png", "cannot be read", "copy it again")
    refused(lambda: read_image(tmp_path / "zero.png"), "zero.png", "empty (0 bytes)")
    refused(lambda: read_image(tmp_path / "text.png"), "text.png", "not an image")
    refused(lambda: read_image(tmp_path / "flip.png"), "flip.png", "cannot be read")
    refused(lambda: read_image(tmp_path / "folder.png"), "folder.png", "no regular file")
    refused(lambda: read_image(tmp_path / "none.png"), "none.png", "does not exist")


def test_other_decoders_are_never_tried(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.gif")
    refused(lambda: read_image(tmp_path / "a.gif"), "a.gif", "not an image")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused(lambda: read_image(tmp_path / "a.eps"), "a.eps", "not an image")


@pytest.mark.parametrize("side", [100_000, 12_000, 11_586])
def test_huge_header_is_refused_before_decoding(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_bytes(side, side, 8, 0, zlib.compress(bytes(1000))))
    begin = time.perf_counter()
    refused(lambda: read_image(tmp_path / "a.png"), "a.png", "the header claims", str(MAX_PIXELS), "tiles")
    assert time.perf_counter() - begin < 1


def test_pages_are_refused(tmp_path):
    page = Image.fromarray(GREY)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    refused(lambda: read_image(tmp_path / "a.tif"), "a.tif", "3 pages", "one image a file")


def test_no_warning_leaks(tmp_path):
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(200)))
    (tmp_path / "wide.png").write_bytes(png_bytes(10_000, 10_000, 8, 0, zlib.compress(bytes(1000))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / "p.png"), GREY)
        assert read_header(tmp_path / "wide.png") == (10_000, 10_000, True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255, 127, 128, 64], [0, 1, 0, 1, 0]),  # not binary, as 85 IRSTD-1K masks: above half of 255
        ([0, 1, 0, 1, 1], [0, 1, 0, 1, 1]),  # 0/1 coding
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([0, 64, 2, 0, 0], [0, 0, 0, 0, 0]),  # 8-bit without a value above half
        ([0, 65535, 32767, 32768, 255], [0, 1, 0, 1, 0]),
        ([0, 255, 100, 0, 255], [0, 1, 0, 0, 1]),  # 255 in a 16-bit file
        ([0.0, 1.0, 0.5, 0.51, 0.1], [0, 1, 0, 1, 0]),
    ],
)
def test_mask_threshold_is_half_of_its_coding(tmp_path, values, expected):
    array = np.array([values])
    assert binarise(array).astype(int).tolist() == [expected]
    if array.dtype.kind == "f":
        Image.fromarray(array.astype(np.float32)).save(tmp_path / "m.tif")
    else:
        Image.fromarray(array.astype(np.uint16 if array.max() > 255 else np.uint8)).save(tmp_path / "m.tif")
    mask = read_mask(tmp_path / "m.tif")
    assert mask.dtype == np.bool_
    assert mask.astype(int).tolist() == [expected]


def test_mask_of_another_size_is_an_error_never_resized(tmp_path):
    write_mask(tmp_path / "Misc_111.png", np.zeros((400, 592), bool))
    refused(
        lambda: read_mask(tmp_path / "Misc_111.png", (220, 325)),
        "Misc_111.png",
        "400 x 592",
        "220 x 325",
        "never resized",
    )


def test_write_mask_round_trip_and_old_file_kept(tmp_path):
    mask = GREY > 100
    write_mask(tmp_path / "new" / "m.png", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "new" / "m.png", mask.shape), mask)
    assert set(np.unique(np.asarray(Image.open(tmp_path / "new" / "m.png")))) == {0, 255}
    with pytest.raises(TypeError, match="bool"):
        write_mask(tmp_path / "new" / "m.png", GREY)
    np.testing.assert_array_equal(read_mask(tmp_path / "new" / "m.png"), mask)
    assert [path.name for path in Path(tmp_path / "new").iterdir()] == ["m.png"]


def test_no_flipped_bit_of_a_png_gives_other_pixels(tmp_path):
    """Pillow compares no checksum of the pixels; a tail that is cut off is told, too."""
    mask = np.zeros((48, 48), bool)
    mask[20:23, 11:14] = True
    path = tmp_path / "mask.png"
    write_mask(path, mask)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(lambda: read_mask(path), str(path), "export or copy it again")
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        refused(lambda: read_mask(path), str(path), "export or copy it again")
    path.write_bytes(whole + b"more")
    assert np.array_equal(read_mask(path), mask)
    path.write_bytes(whole[:-20] + bytes(4) + whole[-16:])  # the checksum of the pixels
    refused(lambda: read_mask(path), "the checksum of its chunk IDAT does not fit")


def test_random_damage_gives_only_input_errors(tmp_path):
    """Some hundred mutated files of each kind: read, or refused by our own error."""
    Image.fromarray(GREY).save(tmp_path / "a.png")
    Image.fromarray(DEEP).save(tmp_path / "a.tif")
    Image.fromarray(GREY).save(tmp_path / "a.bmp")
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    rng = np.random.default_rng(1)
    refusals = 0
    for kind in ("png", "tif", "bmp", "jpg"):
        whole = np.frombuffer((tmp_path / f"a.{kind}").read_bytes(), np.uint8)
        for _ in range(150):
            data = whole.copy()
            where = rng.integers(0, len(data), rng.integers(1, 6))
            data[where] = rng.integers(0, 256, len(where))
            (tmp_path / f"x.{kind}").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
            try:
                assert read_image(tmp_path / f"x.{kind}").ndim == 2
            except InputError as error:
                refusals += 1
                assert f"x.{kind}" in str(error) and "\n" not in str(error)
    assert refusals > 100


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("depth", [8, 16])
def test_turned_images_are_refused(kind: str, depth: int, tmp_path: Path) -> None:
    """A viewer turns them by their EXIF tag, and a click on what it shows lies elsewhere in the pixels."""
    if kind == "jpg" and depth == 16:
        kind = "bmp"  # JPEG has 8 bits; and a format without EXIF passes
    pixels = np.arange(6, dtype=np.uint8 if depth == 8 or kind == "bmp" else np.uint16).reshape(2, 3)
    path = tmp_path / f"a.{kind}"
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(path, exif=exif)
        if orientation == 1 or kind == "bmp":
            assert read_image(path).shape == (2, 3) and read_header(path)[:2] == (2, 3)
            continue
        for read in (read_image, read_header, read_mask):
            refused(lambda read=read: read(path), str(path), f"EXIF orientation is {orientation}", "without the tag")
