"""Makes the modules beside this file importable, and prints what became of each corpus."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
