"""Commands. ``main.py`` picks one; ``compose.py`` is the only place that imports Hydra."""
