"""What each target needs of a package's graph. `for_onnxruntime` and `for_tensorrt` list their passes.

A pass changes one thing, is one class with one `call`, and has its own test.
"""

from qwenport.engines.lowering.float32 import ComputeInFloat32
from qwenport.engines.lowering.targets import for_onnxruntime

__all__ = ["ComputeInFloat32", "for_onnxruntime"]
