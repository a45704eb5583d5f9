"""OSDFace in the Stable-Diffusion WebUIs: all that knows `modules.*` and gradio.

The hosts put an extension's root on sys.path, so this is a top-level name there, like the core's;
`webui` would be their own launch script. Only scripts/ imports it.
"""
