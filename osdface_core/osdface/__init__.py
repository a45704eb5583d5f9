"""OSDFace (Wang et al., CVPR 2025): face crops -> visual prompts -> restored crops."""
