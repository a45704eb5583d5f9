"""Everything that depends on ComfyUI's internals.

Run on 0.3.64 and 0.33.0; what newer versions changed (read up to 0.38) is looked up by name before
it is used.
"""
