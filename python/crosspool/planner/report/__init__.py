"""A plan as tables and as plots."""
