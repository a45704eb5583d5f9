"""All that knows ComfyUI's insides."""
