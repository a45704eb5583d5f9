"""Adds features of newer hosts to node schemas."""

from __future__ import annotations

from comfy_api.latest import io


def with_newer_features(
    schema: io.Schema,
    *,
    search: tuple[str, ...] = (),
    advanced: tuple[str, ...] = (),
    shows: bool = False,
) -> io.Schema:
    """The schema with features of newer hosts, where this host has them.

    schema: of a node; it is changed.
    search: other names that people search for.
    advanced: ids of inputs that are rarely changed, to be folded away.
    shows: whether what the node shows on itself is to stay when the page is loaded again.
    """
    if hasattr(schema, "search_aliases"):
        schema.search_aliases = list(search)
    if hasattr(schema, "has_intermediate_output"):
        schema.has_intermediate_output = shows
    for given in schema.inputs:
        if given.id in advanced and hasattr(given, "advanced"):
            given.advanced = True
    return schema
