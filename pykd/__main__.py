"""`python -m pykd` is `pykd`."""

from __future__ import annotations

import sys

from pykd.cli import main

if __name__ == "__main__":
    sys.exit(main())
