"""Placement policies: load -> who sits where, one file each."""
