"""All that knows ComfyUI's insides. Run on 0.3.64; what newer versions changed (read up to 0.38) is
asked for by name before it is used.
"""
