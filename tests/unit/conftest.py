"""Fixtures that several files share."""

from toy_book import checkout  # noqa: F401
from toy_maps import resnet, wide  # noqa: F401
from toy_run import begin, claims  # noqa: F401
from toy_site import site  # noqa: F401
