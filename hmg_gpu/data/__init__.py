"""Everything that reads users' files, and the form in which a set lives in memory."""

from .folder import NORMALISATION, find_images, load_folder, load_images, load_points, split_names
from .images import binarise, read_image, read_mask, write_mask
from .points import PointReport, check_points, read_points
from .sets import ImageSet
from .store import iterate_store, load_store, pack_folder, store_splits, write_store

__all__ = [
    "NORMALISATION",
    "ImageSet",
    "PointReport",
    "binarise",
    "check_points",
    "find_images",
    "iterate_store",
    "load_folder",
    "load_images",
    "load_points",
    "load_store",
    "pack_folder",
    "read_image",
    "read_mask",
    "read_points",
    "split_names",
    "store_splits",
    "write_mask",
    "write_store",
]
