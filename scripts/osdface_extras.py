"""The WebUI's door to the Extras tab. The work is in osdface_webui."""

from osdface_webui.extras import ScriptPostprocessingOSDFace  # noqa: F401
