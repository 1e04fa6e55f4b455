"""Refuse a checkout without links, which would be installed without its components; pyproject.toml says the rest."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from qwenport import missing_link

if wrong := missing_link():
    sys.exit(f"error: {wrong}")

setup()
