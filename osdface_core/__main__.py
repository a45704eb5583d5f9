"""`python -m osdface_core`."""

from __future__ import annotations

import os
import sys

from .cli import main

# OpenMP's threads wait for each other by turning in a loop. Where other programs have the
# processors too, that takes ten times as long as the work. Read when torch is loaded, after this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.exit(main())
