"""Everything that reads users' files, and the form in which a set lives in memory."""

from hmg_gpu.data.folder import NORMALISATION, find_images, load_folder, load_images, load_points, split_names
from hmg_gpu.data.images import binarise, read_image, read_mask, write_mask
from hmg_gpu.data.points.read import PointReport, check_points, read_extents, read_points
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.data.store import iterate_store, load_store, pack_folder, store_splits, write_store

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
    "read_extents",
    "read_image",
    "read_mask",
    "read_points",
    "split_names",
    "store_splits",
    "write_mask",
    "write_store",
]
