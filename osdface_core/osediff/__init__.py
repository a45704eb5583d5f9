"""OSEDiff (Wu et al., NeurIPS 2024): enlarges and restores a whole picture in one step."""
