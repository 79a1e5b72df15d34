"""Point labels from annotation tools."""

from hmg_gpu.data.points.read import PointReport, check_points, image_stem, read_points

__all__ = ["PointReport", "check_points", "image_stem", "read_points"]
