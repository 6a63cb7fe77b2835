"""`python -m dflkern demo`."""
