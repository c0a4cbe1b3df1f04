"""Training: a recipe, an objective, one loop."""
