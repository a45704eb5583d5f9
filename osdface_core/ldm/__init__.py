"""Stable Diffusion 2.1's networks in plain torch, on tensors of a file or of another program.

layers     layers that compute on weights kept anywhere, in any type, with LoRAs or without
networks   the UNet and the autoencoder, named as the original (LDM) code names their parts
loading    reads, checks and assigns the tensors
backbone   both networks as the core's Backbone
builtin    the small built-in model
osediff    with OSEDiff's weights
text       the empty text, for OSEDiff
"""
