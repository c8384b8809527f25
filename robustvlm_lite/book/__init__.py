"""What a chapter's notebook calls: start and footer, figures, tables, glued numbers, and exercises that answer back."""

from .bundled import known_table, learning_curves, making_table, model_cards, nearly_done, notes_tables, overlap_table
from .markup import Html, table
from .measure import (
    batched,
    committed_card,
    defended,
    images,
    map_facts,
    measure,
    measure_logits,
    measure_maps,
    measure_seconds,
    training_cost,
)
from .run import Run, footer, glue, show, start
from .tables import (
    accuracy_table,
    claims_table,
    compared,
    paired_table,
    published_table,
    rates_table,
    sanity_table,
    sets_table,
)
from .tuning import backbone, marked, measure_scenario, scenario_table, tune

__all__ = [
    "Html",
    "Run",
    "accuracy_table",
    "backbone",
    "batched",
    "claims_table",
    "committed_card",
    "compared",
    "defended",
    "footer",
    "glue",
    "images",
    "known_table",
    "learning_curves",
    "making_table",
    "map_facts",
    "marked",
    "measure",
    "measure_logits",
    "measure_maps",
    "measure_scenario",
    "measure_seconds",
    "model_cards",
    "nearly_done",
    "notes_tables",
    "overlap_table",
    "paired_table",
    "published_table",
    "rates_table",
    "sanity_table",
    "scenario_table",
    "sets_table",
    "show",
    "start",
    "table",
    "training_cost",
    "tune",
]
