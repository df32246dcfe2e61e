"""``moetrain doctor``: this machine (``here``), its ranks (``rank``), their groups, pairs and shared storage."""
