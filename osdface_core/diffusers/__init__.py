"""diffusers as a host of Stable Diffusion 2.1; it and peft are imported only inside functions."""
