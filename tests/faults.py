"""Where test_validate.py looks for these two; the defects are in defects/."""

from defects.tables import wrong_last_rope_row
from defects.tools import seed

__all__ = ["seed", "wrong_last_rope_row"]
