"""The network that TensorRT's parser produces, evaluated without a GPU.

TensorRT's own parser makes a network from the lowered model, exactly as in `build`. That network is walked layer by
layer and evaluated in torch on the CPU.
"""

from qwenport.validate.network.interpreter import Interpreter, Program
from qwenport.validate.network.parse import ParsedNetwork, parse_model, parse_package
from qwenport.validate.network.session import NetworkSession

__all__ = [
    "Interpreter",
    "NetworkSession",
    "ParsedNetwork",
    "Program",
    "parse_model",
    "parse_package",
]
