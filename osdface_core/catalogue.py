"""The weight files of all methods, for hosts and for install.py."""

from __future__ import annotations

from .faces import files as faces
from .osdface import files as osdface
from .osediff import files as osediff
from .sd21 import files as sd21
from .weights.catalogue import Catalogue

CATALOGUE = Catalogue(
    files=osdface.FILES + faces.FILES + osediff.FILES + sd21.FILES,
    searched=osdface.SEARCHED | faces.SEARCHED | osediff.SEARCHED | sd21.SEARCHED,
)
