"""`python -m qwenport`."""

import sys

from qwenport.cli import main

sys.exit(main())
