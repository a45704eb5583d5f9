"""Stable Diffusion 2.1, whoever holds its networks: schedule, backbone, LoRA adapters, one step."""
