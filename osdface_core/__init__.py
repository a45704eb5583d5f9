"""OSDFace face restoration, free of any host application. See backbone.py for what a host supplies."""
