"""ComfyUI nodes: a schema and a short execute each. The work is in osdface_core."""
