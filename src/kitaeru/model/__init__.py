"""Load, quantise and adapt a model; generate from it."""
