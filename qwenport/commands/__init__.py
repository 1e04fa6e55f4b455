"""One module per command, each exposing `command`; `qwenport.cli` imports it when it is invoked.

A module here may import click at the top level; torch, onnx and the other packages are imported
inside the functions that need them.
"""
