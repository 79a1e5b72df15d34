"""Both stages of training (HMG Sec. 4)."""

from hmg_gpu.training.loop import StopRequest, Training
from hmg_gpu.training.settings import Settings

__all__ = ["Settings", "StopRequest", "Training"]
