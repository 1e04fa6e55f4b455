"""What can make a question about parity senseless. A failed check is no error: it is in the report."""

from qwenport import QwenportError


class ValidationError(QwenportError):
    """The target and the reference cannot be compared: not a package, or made from another checkpoint."""


class NetworkError(ValidationError):
    """TensorRT's network cannot be evaluated: the parser refuses the model, or a layer is not known here.

    It says that the target is wrong or unproven, so `validate` makes it a failure and not a senseless question.
    """


LONGEST_LINE = 300


def one_line(what: str, error: BaseException) -> str:
    """`what` and what a library said of it, in one line of at most LONGEST_LINE characters."""
    text = " ".join(f"{what}: {type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 1] + "…"
