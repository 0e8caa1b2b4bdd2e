"""Shapes of models: enough of a ``config.json`` to count bytes, of any decoder."""
