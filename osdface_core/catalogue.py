"""The weight files of all methods, for hosts and for install.py."""

from __future__ import annotations

from .diffir import files as diffir
from .faces import files as faces
from .osdface import files as osdface
from .osediff import files as osediff
from .sd21 import files as sd21
from .weights.catalogue import Catalogue

CATALOGUE = Catalogue(
    files=osdface.FILES + faces.FILES + osediff.FILES + sd21.FILES,
    # DiffIR's files cannot be fetched, and any number of them may be there.
    searched=osdface.SEARCHED | faces.SEARCHED | osediff.SEARCHED | sd21.SEARCHED | diffir.SEARCHED,
)
