"""Learned masks: small networks that learn from PMG's masks of the same points (beyond the paper)."""

from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.masks.student.train import train_student

__all__ = ["Student", "StudentSettings", "train_student"]
