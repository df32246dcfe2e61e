"""Routers: logits -> choices, one file each."""
