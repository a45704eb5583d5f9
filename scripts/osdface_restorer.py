"""The WebUI's door: face restorer, upscaler, settings, plot axis and API; see osdface_webui."""

from modules import script_callbacks, scripts

from osdface_webui import extras, restorer, settings, upscaler


class OSDFaceParameters(restorer.Parameters, scripts.Script):
    """The host takes every Script that it finds in this file."""


def add_routes(demo, app):
    # The host's API is imported by then, where it is wanted.
    from osdface_webui.api import add_routes

    add_routes(demo, app)


script_callbacks.on_before_ui(extras.forget_source)
script_callbacks.on_before_ui(restorer.register)
script_callbacks.on_before_ui(upscaler.register)
script_callbacks.on_after_component(extras.note_source)
script_callbacks.on_ui_settings(settings.add_settings)
script_callbacks.on_app_started(add_routes)
