"""The one exception of the recording, and those of a closure outside of its domain."""

from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# A Cholesky factor that does not exist, the scale of a distribution, math.log.
UNDEFINED = (LinAlgError, ArithmeticError, ValueError)


class RecordError(RuntimeError):
    """A closure that cannot be recorded; the message names the reason and the way out."""
