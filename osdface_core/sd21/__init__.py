"""Stable Diffusion 2.1-base, in any host: schedule, backbone, adapters, one step, tiles."""
