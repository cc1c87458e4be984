"""Recipes: each module is one script, run with `python -m examples.<name>`."""
