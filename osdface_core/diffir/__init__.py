"""DiffIR (Xia et al., ICCV 2023): enlarges, sharpens and fills pictures by small networks."""
