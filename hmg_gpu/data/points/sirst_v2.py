"""SIRST-V2 centroid XML, one file an image: the ``<centroid>`` of each ``<object>``.

1-based: the top left pixel is (1, 1); 1 is subtracted, then floored. The image is the one named like the XML file or,
failing that, the stem in ``<filename>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, declared_size, text_number


def matches(root: Element) -> bool:
    """Whether the file describes the objects of one image (Pascal VOC's elements)."""
    return root.tag == "annotation" or root.find("object") is not None


def entries(path: Path, root: Element) -> Iterator[Entry]:
    """The one entry of a file."""
    points = []
    for i, element in enumerate(root.findall("object")):
        where = f"<object> {i + 1}"
        texts = element.findtext("centroid/yc"), element.findtext("centroid/xc")
        if None in texts:
            raise InputError(f"{path}, {where}: no <centroid> with <yc> and <xc>; supply SIRST-V2's centroid files")
        y, x = (text_number(text, path, where) - 1 for text in texts)
        points.append((y, x, where))
    size = declared_size(root.findtext("size/height"), root.findtext("size/width"), path, text_number)
    yield Entry(path, root.findtext("filename") or path.stem, size, points, own_stem=path.stem)


FORMAT = PointFormat("xml", matches, entries, "a SIRST-V2 centroid file")
