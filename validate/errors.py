"""What can make a question about parity senseless. A failed check is no error: it is in the report."""

from qwenport import QwenportError


class ValidationError(QwenportError):
    """The target and the reference cannot be compared: not a package, or made from another checkpoint."""


class NetworkError(ValidationError):
    """TensorRT's network cannot be evaluated: the parser refuses the model, or a layer is not known here.

    It says that the target is wrong or unproven, so `validate` makes it a failure and not a senseless question.
    """
