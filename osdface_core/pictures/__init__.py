"""Pictures as tensors: geometry, resampling, colour."""
