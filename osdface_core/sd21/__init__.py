"""Stable Diffusion 2.1-base, whoever holds its networks: schedule, backbone, adapters, one step."""
