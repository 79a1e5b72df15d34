"""One door for the commands: whatever --data names becomes an :class:`ImageSet`."""

from __future__ import annotations

from pathlib import Path

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.folder import load_folder, split_names
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.data.store import load_store, store_splits

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

    Example:
        >>> from hmg_gpu.data.source import load_split
        >>> data = load_split("synthetic", "test")
        >>> len(data), data.images.shape[1:], data.names[:2]
        (48, torch.Size([128, 128]), ['test_0000', 'test_0001'])
    """
    if data == SYNTHETIC:
        from hmg_gpu.data.synthetic import make_split

        return make_split(split, points=points, seed=seed)
    path = Path(data)
    if not path.exists():
        raise InputError(f"{data}: no such data set; give its folder, a packed .h5 file, or {SYNTHETIC}")
    is_store = path.is_file()
    if missing_ok and split not in (store_splits(path) if is_store else split_names(path)):
        return None
    return load_store(path, split, points=points) if is_store else load_folder(path, split, points=points)


def default_extent(dataset: str) -> int:
    """The paper's L_ep in pixels (HMG Sec. 4.2): 10 for NUDT-SIRST, whose scenes are crowded, 25 for any other set.

    Example:
        >>> from hmg_gpu.data.source import default_extent
        >>> default_extent("NUDT-SIRST"), default_extent("NUAA-SIRST")
        (10, 25)
    """
    return 10 if dataset == "NUDT-SIRST" else 25
