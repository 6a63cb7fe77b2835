"""The subcommands of `python -m dflkern`."""
