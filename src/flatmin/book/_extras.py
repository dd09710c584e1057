"""Packages that only an extra installs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Context for imports that need ``extra``: if a package is missing, say how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs the package {error.name!r}, which is not installed: "
            f"pip install 'flatmin[{extra}]'",
            name=error.name,
        ) from error
