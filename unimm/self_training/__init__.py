"""STARS: a model that thinks before it generates teaches itself to generate the same at once (docs/stars.md)."""
