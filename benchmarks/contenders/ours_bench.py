"""A package or an engine through `engines.measure`, as `qwenport bench` does; loading begins after the imports.

python ours_bench.py '{"target": ..., "imports": ["onnxruntime", "torch"], "prompt_tokens": 512, "new_tokens": 64}'
"""

from __future__ import annotations

import importlib
import json
import sys

from qwenport.engines import measure


def main() -> None:
    """Measure and print."""
    request = json.loads(sys.argv[1])
    for name in request.pop("imports"):
        importlib.import_module(name)
    print(json.dumps(vars(measure(**request))))


if __name__ == "__main__":
    main()
