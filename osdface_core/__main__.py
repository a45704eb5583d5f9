"""`python -m osdface_core`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
