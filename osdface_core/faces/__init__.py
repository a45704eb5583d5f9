"""Faces of pictures: found, followed, chosen, cut out upright, and pasted back."""
