"""The custom operators. One folder per operator: its definition (schema, torch reference, ONNX function body).

A model carries each operator it uses as an ONNX function, so it runs without any plugin. The operators are modules
of this package, imported only where they are computed (`from qwenport.plugins import moe_router`), since they import
torch; their names in graphs are in `qwenport.contract`. `compiled` builds the library of CUDA kernels that TensorRT
loads.
"""
