"""Datasets as users have them, each a source of records in a fixed order; docs/data.md."""
