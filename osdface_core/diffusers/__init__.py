"""diffusers as a host of Stable Diffusion 2.1."""
