"""What can go wrong, by whose fault: the doors map each class to an exit code or an HTTP status.

A message is one line that names the value, the limit and the fix.
"""


class Step1XEditError(Exception):
    """Base of every error that this package raises on purpose. Exit code 1."""


class InvalidRequest(Step1XEditError, ValueError):
    """The request cannot be carried out as it stands. Exit code 2, HTTP 422."""


class CheckpointError(Step1XEditError):
    """A model folder or file does not hold what it should. Exit code 2."""


class MissingExtra(Step1XEditError, ImportError):
    """An optional dependency is needed and not installed. Exit code 2."""


class OutOfMemory(Step1XEditError):
    """There is not enough memory for a model or an edit as it is set. Exit code 1."""


_SHORTAGE = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def is_shortage(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch says that there is no more memory."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(said in words for said in _SHORTAGE)
