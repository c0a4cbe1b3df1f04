"""Serving: one engine that batches the requests of many clients, and an OpenAI-compatible HTTP application over it."""
