"""Figures printed in the papers, and the same figures counted from our networks."""

from hrpose.published.row import COUNTINGS, Published
from hrpose.published.table import PUBLISHED, format_table, markdown_table, table

__all__ = ["COUNTINGS", "PUBLISHED", "Published", "format_table", "markdown_table", "table"]
