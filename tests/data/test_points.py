"""Point labels: one hand-made scene written to every tool's schema, and files that are wrong or hostile."""

from __future__ import annotations

import builtins
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import check_points, load_images, read_points
from hmg_gpu.data.points import parsing
from hmg_gpu.data.points.formats import READERS
from hmg_gpu.data.points.parsing import Entry, PointFormat

# Two images of 20 x 30 (height x width). Points as an annotator clicks them: pixel (y, x) covers [y, y+1) x [x, x+1).
SIZE = (20, 30)
CLICKS = {"a": [(3.2, 7.9), (0.0, 0.0)], "b": [(19.5, 29.5)], "c": []}
PIXELS = {"a": [[3, 7], [0, 0]], "b": [[19, 29]], "c": []}
NAMES = list(CLICKS)
SIZES = np.array([SIZE] * 3)


def write_png(folder: Path) -> Path:
    for name, rows in PIXELS.items():
        image = np.zeros(SIZE, np.uint8)
        for y, x in rows:
            image[y, x] = 255
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def write_csv(folder: Path) -> Path:
    rows = [f"1,{x},{name}.png,{y}" for name, clicks in CLICKS.items() for y, x in clicks]
    (folder / "points.csv").write_text("\n".join(["score,x,Image,Y", *rows, "0,,c.png,"]) + "\r\n")
    return folder / "points.csv"


def write_labelme(folder: Path) -> Path:
    for name, clicks in CLICKS.items():
        shapes = [{"label": "t", "shape_type": "point", "points": [[x, y]]} for y, x in clicks]
        shapes.append({"label": "box", "shape_type": "rectangle", "points": [[1, 1], [5, 5]]})
        content = {"shapes": shapes, "imagePath": f"..\\images\\{name}.png", "imageHeight": 20, "imageWidth": 30}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_cvat(folder: Path) -> Path:
    images = ""
    for i, (name, clicks) in enumerate(CLICKS.items()):
        listed = ";".join(f"{x},{y}" for y, x in clicks)
        inner = (
            f'<points label="t" occluded="0" points="{listed}"/>'
            if clicks
            else '<box xtl="1" ytl="1" xbr="2" ybr="2"/>'
        )
        images += f'<image id="{i}" name="task/{name}.png" width="30" height="20">{inner}</image>'
    text = f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{images}</annotations>'
    (folder / "annotations.xml").write_text(text)
    return folder / "annotations.xml"


def write_coco(folder: Path) -> Path:
    images = [{"id": i, "file_name": f"sub/{name}.png", "height": 20, "width": 30} for i, name in enumerate(CLICKS)]
    annotations = []
    for i, clicks in enumerate(CLICKS.values()):
        flat = [value for y, x in clicks for value in (x, y, 2)]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "keypoints": [*flat, 0, 0, 0]})
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return folder / "coco.json"


def write_labelstudio(folder: Path) -> Path:
    tasks = []
    for i, (name, clicks) in enumerate(CLICKS.items()):
        result = [
            {
                "type": "keypointlabels",
                "original_width": 30,
                "original_height": 20,
                "image_rotation": 0,
                "value": {"x": x / 30 * 100, "y": y / 20 * 100, "width": 0.5, "keypointlabels": ["t"]},
            }
            for y, x in clicks
        ]
        ways = (
            f"/data/upload/7/0a1b2c3d-{name}.png",
            f"/data/local-files/?d=set%2F{name}.png",
            f"s3://bucket/{name}.png",
        )
        tasks.append({"id": i, "data": {"image": ways[i]}, "annotations": [{"result": result}]})
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder / "export.json"


def write_sirst_v2(folder: Path) -> Path:
    for name, clicks in CLICKS.items():
        objects = "".join(
            f"<object><name>t</name><centroid><yc>{y + 1}</yc><xc>{x + 1}</xc></centroid></object>" for y, x in clicks
        )
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "png": write_png,
    "csv": write_csv,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "coco": write_coco,
    "labelstudio": write_labelstudio,
    "sirst-v2": write_sirst_v2,
}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("given", [True, False], ids=["named", "detected"])
def test_every_format_gives_the_same_pixels(tmp_path, format, given):
    path = WRITERS[format](tmp_path)
    found = read_points(path, format if given else None, NAMES, SIZES)
    assert {
        name: rows.tolist() if name != "a" else sorted(rows.tolist(), reverse=True) for name, rows in found.items()
    } == PIXELS
    assert all(rows.dtype == np.int64 and rows.shape[1] == 2 for rows in found.values())
    everything = read_points(path)  # without names: every image that the file knows
    assert {name for name, rows in everything.items() if len(rows)} == {"a", "b"}


@pytest.mark.parametrize("format", WRITERS)
def test_a_named_format_equals_detection(tmp_path, format):
    path = WRITERS[format](tmp_path)
    named, detected = read_points(path, format=format), read_points(path)
    assert {key: rows.tolist() for key, rows in named.items()} == {key: rows.tolist() for key, rows in detected.items()}


def test_the_scene_is_written_in_every_format():
    assert list(WRITERS) == list(READERS)


def test_another_format_is_one_more_reader(tmp_path, monkeypatch):
    def entries(path, content):
        yield Entry(path, "a", None, [(y, x, "rows") for y, x in content["rows"]])

    other = PointFormat("json", lambda content: "rows" in content, entries, "a file of 'rows'")
    monkeypatch.setitem(READERS, "rows", other)
    path = file_with(tmp_path, "rows.json", '{"rows": [[1.5, 2.5]]}')
    assert read_points(path)["a"].tolist() == read_points(path, "rows")["a"].tolist() == [[1, 2]]
    refused(lambda: read_points(path, "row"), "labelme", "rows")
    refused(
        lambda: read_points(file_with(tmp_path, "b.json", "{}")),
        "JSON with neither LabelMe's 'shapes', COCO's 'images', Label Studio's tasks nor a file of 'rows'; export",
    )


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "P", "F"])
def test_every_format_with_every_image_mode_gives_the_same_set(tmp_path, format, mode):
    """Pixels and points do not depend on how image and points were stored."""
    grey = np.arange(600, dtype=np.uint8).reshape(SIZE)
    (tmp_path / "images").mkdir()
    (tmp_path / "points").mkdir()
    for name in NAMES:
        if mode == "I;16":
            Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "images" / f"{name}.png")
        elif mode == "F":
            Image.fromarray(grey.astype(np.float32)).save(tmp_path / "images" / f"{name}.tif")
        else:
            Image.fromarray(grey).convert(mode).save(tmp_path / "images" / f"{name}.png")
    loaded = load_images(tmp_path / "images", points=WRITERS[format](tmp_path / "points"))
    assert loaded.points.tolist() == [[0, 0, 0], [0, 3, 7], [1, 19, 29]]
    assert loaded.names == NAMES
    for image in loaded.images:
        np.testing.assert_array_equal(image.numpy(), grey)


def test_whole_pixels_survive_percent(tmp_path):
    """x = 100 * k / width multiplied out again can fall below k; no pixel may slip to its neighbour."""
    results = []
    for k in range(333):
        value = {"x": 100 * k / 333, "y": k / 333 * 100}
        results.append({"type": "keypointlabels", "original_width": 333, "original_height": 333, "value": value})
    tasks = [{"data": {"image": "a.png"}, "annotations": [{"result": results}]}]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    assert read_points(tmp_path / "a.json")["a"].tolist() == [[k, k] for k in range(333)]


def test_labelme_beside_the_images(tmp_path):
    write_png(tmp_path)  # here the images themselves, not points
    write_labelme(tmp_path)
    assert read_points(tmp_path, None, NAMES, SIZES)["b"].tolist() == [[19, 29]]
    assert load_images(tmp_path, points=tmp_path).points.tolist() == [[0, 0, 0], [0, 3, 7], [1, 19, 29]]


def test_label_formats_inside_a_folder_are_read_whole(tmp_path):
    write_cvat(tmp_path)
    assert read_points(tmp_path, None, NAMES, SIZES)["a"].tolist() == [[3, 7], [0, 0]]


# ---- wrong files


def scene(tmp_path: Path, format: str, old: str, new: str) -> Path:
    """The scene in one format with a piece of its text replaced."""
    path = WRITERS[format](tmp_path)
    if path.is_dir():
        path = next(file for file in sorted(path.iterdir()) if old in file.read_text())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def file_with(tmp_path: Path, name: str, content: str | bytes) -> Path:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("format", "old", "new", "where"),
    [
        ("csv", "7.9", "{}", "row 2, x"),
        ("labelme", "7.9", "{}", "shapes[0]"),
        ("cvat", "7.9", "{}", "<image name='task/a.png'>, <points> 1"),
        ("coco", "7.9", "{}", "annotations[0]"),
        ("labelstudio", '"y": 97.5', '"y": {}', "task 2, result 1"),
        ("sirst-v2", "8.9", "{}", "<object> 1"),
    ],
)
@pytest.mark.parametrize("bad", ["1e999", "9" * 5000, "NaN", "-Infinity", '"abc"', "null", "1e12", "1_0", "0x10"])
def test_unusable_numbers_name_the_file_and_the_place(tmp_path, format, old, new, where, bad):
    if format in ("csv", "cvat", "sirst-v2"):
        bad = bad.strip('"')
    path = scene(tmp_path, format, old, new.format(bad))
    text = format in ("csv", "cvat", "sirst-v2")
    in_syntax = not text and (bad in ("NaN", "-Infinity", "1_0", "0x10") or len(bad) > 4000)  # no JSON at all
    refused(
        lambda: read_points(path),
        path.name,
        "no valid JSON" if in_syntax else where,
        "" if in_syntax else "finite number",
    )


@pytest.mark.parametrize(
    ("format", "old", "new", "where"),
    [
        ("csv", "29.5", "30.0", "row 4"),
        ("labelme", "29.5", "30.0", "shapes[0]"),
        ("cvat", "29.5", "30.0", "<image name='task/b.png'>, <points> 1"),
        ("coco", "29.5", "30.0", "annotations[1]"),
        ("labelstudio", '"y": 97.5', '"y": 100.5', "task 2, result 1"),
        ("sirst-v2", "30.5", "31.0", "<object> 1"),
        ("sirst-v2", "20.5", "0.5", "<object> 1"),
    ],
)
def test_a_point_outside_its_image_names_everything(tmp_path, format, old, new, where):
    path = scene(tmp_path, format, old, new)
    refused(
        lambda: read_points(path, None, NAMES, SIZES), path.name, where, "point (y=", "outside the image b of 20 x 30"
    )


@pytest.mark.parametrize(("format", "old", "new"), [
    ("labelme", '"imageWidth": 30', '"imageWidth": 60'),
    ("cvat", 'width="30"', 'width="60"'),
    ("coco", '"width": 30', '"width": 60'),
    ("labelstudio", '"original_width": 30, "original_height": 20', '"original_width": 60, "original_height": 20'),
])  # fmt: skip
def test_points_of_a_rescaled_image_are_refused(tmp_path, format, old, new):
    path = WRITERS[format](tmp_path)
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        file.write_text(file.read_text().replace(old, new))
    refused(lambda: read_points(path, None, NAMES, SIZES), "20 x 60", "20 x 30", "never rescaled")


def test_point_png_of_another_size(tmp_path):
    write_png(tmp_path)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "b.png")
    refused(lambda: read_points(tmp_path, None, NAMES, SIZES), "b.png", "5 x 5", "20 x 30")


def test_point_png_missing_for_an_image(tmp_path):
    write_png(tmp_path)
    refused(lambda: read_points(tmp_path, None, [*NAMES, "d"]), "d.png", "1 of 4 missing", "all black")


def test_cvats_empty_coco_export_says_what_to_do(tmp_path):
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}
    path = file_with(tmp_path, "a.json", json.dumps(content))
    refused(lambda: read_points(path), "a.json", "no keypoints", "export as 'CVAT for images 1.1'")
    content["annotations"] = [{"image_id": 1, "bbox": [1, 2, 3, 4], "keypoints": []}]
    refused(lambda: read_points(file_with(tmp_path, "b.json", json.dumps(content))), "export as 'CVAT for images 1.1'")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "image|y|x\na|1|2\n", "no point format recognised"),
        ("a.csv", "file;name;y;x\na;b;1;2\n", "file and name may both name the image"),
        ("a.csv", "image;y;x\na;1,5;2.5\n", "decimal points and decimal commas"),
        ("a.csv", "image;y;x\na;1.234,5;2\n", "decimal points and decimal commas"),
        ("a.csv", "image;y;x\na;1,5;2\nb;1.5;2\n", "row 3: '1.5'"),
        ("a.csv", "image;y;x;x\na;1;2;2\n", "once each"),
        ("a.csv", "image;y;x\na;2;1,234\n", "row 2: '1,234' may be a decimal number, or thousands with a mark"),
        ("a.csv", "image\ty\tx\na\t12.345\t1.000\n", "row 2: '12.345' may be a decimal number, or thousands"),
        ("a.csv", "image,y,x\na,3,5,7,9\n", "row 2: 5 cells, the header has 3; where numbers have decimal commas"),
        ("a.csv", "image,x\na,1\n", "no point format recognised"),
        ("a.csv", "image,y,x\na,1\n", "row 2: 2 cells"),
        ("a.csv", 'image,y,x\n"a,1,2\n', "row 2: no valid CSV"),
        ("a.csv", "image,y,x,x\na,1,2,2\n", "once each"),
        ("a.csv", "image,y,x\n\0,1,2\n", "names no image"),
        ("a.csv", "image,y,x\n..,1,2\n", "'..' names no image"),
        ("a.csv", "image,y,x\nu/a.png,1,2\nv/a.png,1,2\n", "matched by stem"),
        ("a.csv", "image,y,x\nä,1,2\n".encode("latin-1"), "byte 10 is not UTF-8"),
        ("a.csv", "image,y,x\na,1,2\n".encode("utf-16"), "not UTF-8"),
        ("a.csv", b"", "empty (0 bytes)"),
        ("a.json", "{", "no valid JSON"),
        ("a.json", "[" * 100_000, "no valid JSON"),
        (
            "a.json",
            "{}",
            "JSON with neither LabelMe's 'shapes', COCO's 'images' nor Label Studio's tasks; "
            "export the points in one of these formats",
        ),
        ("a.json", "[1]", "task 1: 'annotations'"),
        ("a.json", '{"shapes": 3}', "'shapes' is 3; expected a list"),
        ("a.json", '{"shapes": [{"shape_type": "point", "points": [[1]]}]}', "shapes[0]: [[1]]"),
        ("a.json", '{"shapes": [{"shape_type": "point", "points": [["1", 2]]}]}', "shapes[0]: '1' is no usable"),
        ("a.json", '{"shapes": [{"shape_type": "point", "points": [[true, 2]]}]}', "shapes[0]: True is no usable"),
        ("a.json", '{"annotations": [], "images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": ""}]}', "twice"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 4}]}', "image_id 4"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "keypoints": [1, 2]}]}',
            "annotations[0]: keypoints [1, 2]",
        ),
        ("a.json", '[{"data": {"image": "a.png"}, "annotations": [{"result": []}]}]', "KeyPointLabels"),
        ("a.json", '[{"data": {"p": 1}, "annotations": []}]', "expected the image under 'image'"),
        ("a.json", '{"shapes": []}'.encode("utf-16"), "not UTF-8"),
        ("a.xml", "<annotations/>", "CVAT for images 1.1"),
        ("a.xml", '<annotations><track id="0"/></annotations>', "CVAT for images 1.1"),
        ("a.xml", '<annotations><image name="a.png"/></annotations>', "points tool"),
        ("a.xml", '<annotations><image><points points="1,2"/></image></annotations>', "<image> 1: no name"),
        ("a.xml", '<annotations><image name="a"><points points="12"/></image></annotations>', "'12'; expected x,y"),
        ("a.xml", "<annotation><object><bndbox/></object></annotation>", "<object> 1: no <centroid>"),
        ("a.xml", "<annotations>", "no valid XML"),
        ("a.xml", "<html/>", "XML <'html'> is neither CVAT for images 1.1 nor a SIRST-V2 centroid file"),
        ("a.xml", '<?xml version="1.0" encoding="klingon"?><annotation/>', "no valid XML"),
        ("a.xml", "<a>" * 1000, "too deep"),
        ("a.png", b"\x89PNG\r\n\x1a\nrubbish", "cannot be read"),
        ("a.txt", "hello", "no point format recognised"),
    ],
)  # fmt: skip
def test_wrong_files_say_what_is_wrong(tmp_path, name, content, part):
    path = file_with(tmp_path, name, content)
    refused(lambda: read_points(path), str(path), part)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "latin-1"])
def test_xml_entities_are_refused_in_any_encoding(tmp_path, encoding):
    (tmp_path / "secret").write_text("17")
    declared = {"utf-16-be": "utf-16"}.get(encoding, encoding)
    text = (
        f'<?xml version="1.0" encoding="{declared}"?>'
        f'<!DOCTYPE annotation [<!ENTITY e SYSTEM "file://{tmp_path}/secret"><!ENTITY l "&e;&e;&e;">]>'
        "<annotation><object><centroid><yc>&e;</yc><xc>&l;</xc></centroid></object></annotation>"
    )
    data = text.encode(encoding)
    path = file_with(tmp_path, "a.xml", b"\xfe\xff" + data if encoding == "utf-16-be" else data)
    refused(lambda: read_points(path), "a.xml, line 1", "<!DOCTYPE> and entities are refused")
    path = file_with(tmp_path, "b.xml", '<!DOCTYPE annotation SYSTEM "http://localhost/x.dtd"><annotation/>')
    refused(lambda: read_points(path, "sirst-v2"), "<!DOCTYPE>")


@pytest.mark.parametrize(
    "name", ["../{}.png", "/etc/{}.png", "..\\..\\{}.png", "C:\\x\\{}.png", "//host/share/{}.png", "{}.PNG", "{}"]
)
@pytest.mark.parametrize("format", ["csv", "cvat", "coco", "labelstudio", "labelme"])
def test_paths_in_annotations_are_names_and_never_opened(tmp_path, monkeypatch, format, name):
    old = {"csv": "b.png", "cvat": "task/b.png", "coco": "sub/b.png", "labelme": "..\\\\images\\\\b.png"}
    new = name.format("b")
    new = new if format in ("csv", "cvat") else json.dumps(new)[1:-1]
    path = scene(tmp_path, format, old.get(format, "/data/local-files/?d=set%2Fb.png"), new)
    if format == "labelme":
        path = path.rename(tmp_path / "other.json")  # named like no image: imagePath decides
    opened = []
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more)
    )
    found = read_points(path, None, NAMES)
    assert found["b"].tolist() == [[19, 29]]
    assert set(opened) <= {str(path)}


def test_no_image_in_common_is_an_error(tmp_path):
    refused(lambda: read_points(write_csv(tmp_path), None, ["x", "y"]), "points.csv", "'a' ...", "'x' ...", "stem")


def test_limits(tmp_path, monkeypatch):
    path = write_csv(tmp_path)
    monkeypatch.setattr(parsing, "MAX_POINTS", 2)
    for format in WRITERS:
        folder = tmp_path / format
        folder.mkdir()
        path = WRITERS[format](folder)
        if path.is_file():  # three points in one file
            refused(lambda path=path: read_points(path), path.name, "more than 2 points", "split")
    Image.fromarray(np.full((3, 3), 255, np.uint8)).save(tmp_path / "white.png")
    refused(lambda: read_points(tmp_path / "white.png"), "white.png", "9 point pixels")
    monkeypatch.setattr(parsing, "MAX_FILE_BYTES", 10)
    refused(lambda: read_points(path), path.name, "more than 10", "split")
    monkeypatch.undo()
    monkeypatch.setattr(parsing, "MAX_XML_ELEMENTS", 4)
    refused(lambda: read_points(write_cvat(tmp_path)), "annotations.xml", "too large")


def test_unknown_format_and_missing_files(tmp_path):
    refused(lambda: read_points(tmp_path, "yolo"), "'yolo'", "labelme")
    refused(lambda: read_points(tmp_path / "none"), "none", "no such file")
    refused(lambda: read_points(tmp_path), str(tmp_path), "no point files")


DECIMALS = "read with decimal commas, as '3,5' in row 2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Image;Y;X\na.png;3,5;7,9\nb;2;1\n", f"separated by semicolons, images by the column image {DECIMALS}"),
        ("X\tY\tFilename\n7.9\t3.5\ta.png\n1\t2\tb\n", "separated by tabs, images by the column filename"),
        ("name,score,Y,x\na.png,0.5,3.5,7.9\nb,,2,1\n", "separated by commas, images by the column name"),
        ('"file";"y";"x"\n"a.png";"3,5";"7,9"\n"b";"2";"1"\n', f"images by the column file {DECIMALS}"),
        ("image;y;x\na;3.125;7.5\nb;2;1\n", "separated by semicolons, images by the column image"),
        ("image;y;x\na;3,125;7,5\nb;2;1;;\n", f"images by the column image {DECIMALS.replace('3,5', '3,125')}"),
        ("image,name,y,x\na.png,other,3.5,7.9\nb,other,2,1\n", None),  # image decides; others are left alone
        ("IMAGE,Y,X\na.png,3.5,7.9\nb,2,1\n", None),
    ],
)
def test_csv_as_spreadsheets_export_it(text: str, words: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        points = read_points(tmp_path / "a.csv")
    assert {name: rows.tolist() for name, rows in points.items()} == {"a": [[3, 7]], "b": [[2, 1]]}
    said = " ".join(str(one.message).removeprefix(f"{tmp_path / 'a.csv'}: ") for one in told)
    assert said.endswith(words) if words else not said


@pytest.mark.parametrize("format", [None, "csv"])
def test_a_file_that_may_not_be_opened(tmp_path, monkeypatch, format):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write_csv(tmp_path)
    monkeypatch.setattr(builtins, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(lambda: read_points(path, format), "points.csv: cannot be read (Permission denied)", "rights")


def test_label_studio_sizes_that_differ_within_a_task(tmp_path):
    path = scene(tmp_path, "labelstudio", '"original_width": 30', '"original_width": 60')
    refused(lambda: read_points(path), "task 1, result 2", "20 x 30", "20 x 60")


def test_rotated_label_studio_image(tmp_path):
    path = scene(tmp_path, "labelstudio", '"image_rotation": 0', '"image_rotation": 90')
    refused(lambda: read_points(path), "task 1, result 1", "unrotated")


def test_report():
    found = {"a": np.array([[1, 1], [1, 1], [20, 0], [0, -1]]), "z": np.array([[0, 0]])}
    report = check_points(found, ["a", "b"], [SIZE, SIZE])
    assert report.outside == [("a", 20, 0), ("a", 0, -1)]
    assert report.duplicates == [("a", 1, 1)]
    assert report.without_points == ["b"]
    assert report.unknown == ["z"]


def test_random_damage_gives_only_input_errors(tmp_path):
    rng = np.random.default_rng(2)
    refusals = 0
    for format in WRITERS:
        folder = tmp_path / format
        folder.mkdir()
        path = WRITERS[format](folder)
        path = next(iter(sorted(path.iterdir()))) if path.is_dir() else path
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            data = whole.copy()
            where = rng.integers(0, len(data), rng.integers(1, 5))
            data[where] = rng.integers(0, 256, len(where))
            path.write_bytes(data.tobytes())
            try:
                read_points(path, format)
            except InputError as error:
                refusals += 1
                assert str(path) in str(error) and "\n" not in str(error)
    assert refusals > 100


def test_official_labels(data_root):
    """Every point of both splits (protocol.md: 270 + 263)."""
    found = read_points(data_root / "NUAA-SIRST" / "masks_centroid")
    assert (len(found), sum(map(len, found.values()))) == (427, 533)
