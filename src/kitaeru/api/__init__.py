"""The object face."""
