"""Proof that a layout is the same run: one step under it and under a reference, compared tensor by tensor."""
