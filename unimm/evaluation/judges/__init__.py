"""Judges: the exact one, readers in process, readers behind an endpoint, and detectors."""
