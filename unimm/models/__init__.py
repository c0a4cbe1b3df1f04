"""The families, a folder each; their base, and the registry."""
