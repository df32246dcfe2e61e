"""The transformer and its parts; ``transformer.py`` is the one to read first."""
