"""Triton kernels, one file an op; the sources lie in the checkout's top-level folder ``kernels/``.

A folder called ``kernels`` must not be importable by that name (it would shadow the PyPI package), so this
stand-in adds the checkout's folder to its own search path. In a wheel the files lie beside this one.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
