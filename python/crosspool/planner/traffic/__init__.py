"""Requests of models as joint samples: read from traces, or drawn by statistics of lengths."""
