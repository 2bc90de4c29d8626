"""What the package says of itself: its version, and the folder of the model that ships with it."""

from pathlib import Path

__version__ = "0.1.0"

BUNDLED = Path(__file__).parent / "bundled"
"""The folder of the small model that ships with hanok."""
