"""The one exception of the recording."""


class RecordError(RuntimeError):
    """A closure that cannot be recorded; the message names the reason and the way out."""
