"""Dispatchers: tokens to slots and results back, one file each."""
