"""What a chapter's notebook calls: start and footer, figures, tables, glued numbers, and exercises that answer back."""

from .markup import Html, table
from .measure import (
    batched,
    bundled,
    committed_card,
    defended,
    images,
    map_facts,
    measure,
    measure_images,
    measure_logits,
    measure_maps,
    training_cost,
)
from .run import Run, footer, glue, show, start
from .tables import (
    accuracy_table,
    claims_table,
    compared,
    paired_table,
    points,
    published_table,
    rates_table,
    sanity_table,
    sets_table,
)

__all__ = [
    "Html",
    "Run",
    "accuracy_table",
    "batched",
    "bundled",
    "claims_table",
    "committed_card",
    "compared",
    "defended",
    "footer",
    "glue",
    "images",
    "map_facts",
    "measure",
    "measure_images",
    "measure_logits",
    "measure_maps",
    "paired_table",
    "points",
    "published_table",
    "rates_table",
    "sanity_table",
    "sets_table",
    "show",
    "start",
    "table",
    "training_cost",
]
