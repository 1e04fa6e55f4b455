"""One module a command, each exposing `command`; `qwenport.cli` imports it when it is invoked.

A module here may import click at its top; torch, onnx and the rooms of the house are imported
inside the function that needs them.
"""
