"""dflkern inside other frameworks: one module each, with a function `patch()`.

    import dflkern.adapters.ultralytics
    dflkern.adapters.ultralytics.patch()

Importing an adapter does not import its framework; `patch()` does.
"""
