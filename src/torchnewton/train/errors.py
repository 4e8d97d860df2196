"""The one exception for what a user can put right."""


class UsageError(ValueError):
    """A wrong argument, setting or file, explained in one sentence."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch has found no room for an array."""
    words = ("out of memory", "allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def choose(what: str, name: str, valid: list[str]) -> str:
    """Returns `name` if it is one of `valid`; the error names them all.

    >>> choose("method", "adam", ["adam", "sgd"])
    'adam'
    """
    if name not in valid:
        raise UsageError(f"Unknown {what} {name!r}: choose from {', '.join(valid)}.")
    return name
