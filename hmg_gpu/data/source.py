"""One door for the commands: whatever --data names becomes an :class:`ImageSet`."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .folder import load_folder, split_names
from .sets import ImageSet
from .store import load_store, store_splits

SYNTHETIC = "synthetic"


def load_split(
    data: str, split: str, *, points: str | None = "masks_centroid", seed: int = 0, missing_ok: bool = False
) -> ImageSet | None:
    """Load one split of a folder, of a packed .h5 store, or of the embedded synthetic scenes.

    Args:
        data: a folder in the layout of LESPS and BasicIRSTD, a .h5 file, or "synthetic".
        split: "train" or "test".
        points: which point labels; None for none.
        seed: of the synthetic scenes.
        missing_ok: give None where the source has no such split.

    Raises:
        InputError: as the readers.
    """
    if data == SYNTHETIC:
        from .synthetic import make_split

        return make_split(split, points=points, seed=seed)
    path = Path(data)
    if not path.exists():
        raise InputError(f"{data}: no such data set; give its folder, a packed .h5 file, or {SYNTHETIC}")
    is_store = path.is_file()
    if missing_ok and split not in (store_splits(path) if is_store else split_names(path)):
        return None
    return load_store(path, split, points=points) if is_store else load_folder(path, split, points=points)


def default_extent(dataset: str) -> int:
    """The paper's L_ep in pixels (HMG Sec. 4.2): 10 for NUDT-SIRST, whose scenes are crowded, 25 for any other set."""
    return 10 if dataset == "NUDT-SIRST" else 25
