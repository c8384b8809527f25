"""Fixtures that several files share."""

from toy_book import checkout  # noqa: F401
from toy_run import begin, claims  # noqa: F401
