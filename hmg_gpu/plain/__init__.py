"""Plain twins of ``kernels/``, under the same names: what the kernels must equal, and the path of other devices."""
