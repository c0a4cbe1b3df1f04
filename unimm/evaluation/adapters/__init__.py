"""Models of this library for benchmarks that others run: lmms-eval and VLMEvalKit."""
