"""What a run was like, as a page: read ``metrics.jsonl`` (read.py), draw it (plots.py), put it together (page.py)."""
