"""What another trainer plugs in to train on points."""

from hmg_gpu.updater.mask_updater import MaskUpdater

__all__ = ["MaskUpdater"]
