"""Widgets of the nodes at their initial values, but for the files: the built-in ones, and the small
detector.
"""

CHOICE = {
    "select": "all",
    "order": "left to right",
    "indices": "0",
    "max_faces": 0,
    "min_size": 24,
}
FIND = CHOICE | {
    "detector": "retinaface_mobile0.25",
    "confidence": 0.9,
    "max_size": 0,
    "any_angle": False,
    "crop_size": 512,
    "smoothing": 0.0,
}
STEP = {"lora_name": "none", "lora_strength": 1.0, "timestep": 399, "faces_per_batch": 0}
PASTE = {"strength": 1.0, "mask_type": "ellipse", "feather": 0.1, "color_match": "none"}
RESTORE = {"vre_name": "builtin", "lora_name": "none"} | FIND | PASTE
del RESTORE["max_size"]  # which the one node does not have
UPSCALE = {"upscale": 4.0, "tile": 768, "overlap": 256, "color_match": "adain"}
