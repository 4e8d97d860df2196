"""The one exception of the recording, and those of a closure outside of its domain."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# A Cholesky factor that does not exist, the scale of a distribution, math.log.
UNDEFINED = (LinAlgError, ArithmeticError, ValueError)


class RecordError(RuntimeError):
    """A closure that cannot be recorded; the message names the reason and the way out."""


def refuse_complex(params: Iterable[Tensor]) -> None:
    """Raise `RecordError` if one of them is complex."""
    if any(p.is_complex() for p in params):
        raise RecordError(
            "a parameter is complex, which no method here supports: keep it as real numbers and make it complex inside "
            "of the model, as torch.view_as_complex(p)."
        )
