"""What can make a question about parity senseless. A failed check is no error: it is in the report."""

from qwenport import QwenportError


class ValidationError(QwenportError):
    """The target and the reference cannot be compared: not a package, or made from another checkpoint."""
