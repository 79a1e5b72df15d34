"""One file for everything that corrects masks; :data:`hmg_gpu.masks.RULES` lists them."""
