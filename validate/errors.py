"""What can make a parity question meaningless. A failed check is not an error: it is in the report."""

from qwenport import QwenportError


class ValidationError(QwenportError):
    """The target and the reference cannot be compared: not a package, or made from another checkpoint."""


class NetworkError(ValidationError):
    """TensorRT's network cannot be evaluated: the parser refuses the model, or a layer is not known here.

    It means that the target is wrong or unproven, so `validate` reports a failure instead of raising it.
    """
