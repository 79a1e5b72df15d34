"""HMG: one click per target to pixel masks, and those masks to detectors. Names in the order of the paper."""

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.masks.pmg import box_to_mask, point_to_box, point_to_mask, point_to_probability
from hmg_gpu.masks.update import false_alarm_filter, retrieve_missed, soft_update, update
from hmg_gpu.updater.mask_updater import MaskUpdater

__version__ = "0.1.0"

__all__ = [
    "HMGError",
    "InputError",
    "MaskUpdater",
    "box_to_mask",
    "false_alarm_filter",
    "point_to_box",
    "point_to_mask",
    "point_to_probability",
    "retrieve_missed",
    "soft_update",
    "update",
]
