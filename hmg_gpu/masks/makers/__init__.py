"""One file for everything that makes initial masks; :data:`hmg_gpu.masks.MAKERS` lists them."""
