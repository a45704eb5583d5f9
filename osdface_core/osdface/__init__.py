"""OSDFace (Wang et al., CVPR 2025): visual prompts, face crops in, restored crops out."""
