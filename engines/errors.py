"""What can go wrong between a package and its tokens."""

from qwenport import QwenportError


class BuildError(QwenportError):
    """An engine cannot be built from this package for these targets."""


class EngineError(QwenportError):
    """A directory is not an engine, does not match its manifest, or cannot run on this machine."""


class LoweringError(QwenportError):
    """The graph contains something that the target would drop or misread; the message names the node."""


class SessionError(QwenportError):
    """A session was asked to do something it cannot."""


class CapacityError(SessionError):
    """A step would pass the end of the KV cache. Nothing was written."""


class SnapshotError(SessionError):
    """The bytes to restore are not a snapshot, are damaged, or are from another model or session."""


class ProofError(QwenportError):
    """A proof is missing, damaged or of another package, or cannot be made or run here."""


class MeasuringError(QwenportError):
    """What was asked to be measured does not fit the target or the text, or the result is not a number."""
