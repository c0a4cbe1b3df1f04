"""Training: a recipe, a task, one loop."""
