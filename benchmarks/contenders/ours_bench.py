"""A package or an engine through `engines.measure`, as `qwenport bench` does; loading begins after the imports.

python ours_bench.py '{"target": ..., "cache": true, "imports": [], "prompt_tokens": 512, "new_tokens": 64}'
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from qwenport.engines import measure


def main() -> None:
    """Measure and print."""
    request = json.loads(sys.argv[1])
    if not request.pop("cache"):
        os.environ["XDG_CACHE_HOME"] = os.devnull  # a package is then lowered in memory
    for name in request.pop("imports"):
        importlib.import_module(name)
    print(json.dumps(vars(measure(**request))))


if __name__ == "__main__":
    main()
