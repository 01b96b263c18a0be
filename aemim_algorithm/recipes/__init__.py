"""Recipes: from a YAML file to a finished run."""
