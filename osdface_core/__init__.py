"""The work, independent of any host. sd21/backbone.py says what a host supplies."""
