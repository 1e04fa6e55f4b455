"""What can go wrong between a package and its tokens."""

from qwenport import QwenportError


class BuildError(QwenportError):
    """An engine cannot be built from this package for these targets."""


class EngineError(QwenportError):
    """An engine directory is not one, does not match its files, or cannot run on this machine."""


class LoweringError(QwenportError):
    """The graph holds something that the target would drop or misread; the message names the node."""


class SessionError(QwenportError):
    """A session was asked for something it cannot do."""


class CapacityError(SessionError):
    """A step would pass the end of the KV cache. Nothing was written."""
