"""Faces in pictures: detection, tracking, choice, alignment, parsing and pasting."""
