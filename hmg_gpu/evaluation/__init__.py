"""What is measured, and how it is shown: IoU, Pd, Fa; masks, detectors, sweeps; tables, plots, pictures; the paper."""

from hmg_gpu.evaluation.detector import measure_detector, predict_masks
from hmg_gpu.evaluation.masks import collect_masks, load_set, measure_masks
from hmg_gpu.evaluation.metrics import DetectionMetrics, detection_counts, measure
from hmg_gpu.evaluation.size_classes import size_classes

__all__ = [
    "DetectionMetrics",
    "collect_masks",
    "detection_counts",
    "load_set",
    "measure",
    "measure_detector",
    "measure_masks",
    "predict_masks",
    "size_classes",
]
