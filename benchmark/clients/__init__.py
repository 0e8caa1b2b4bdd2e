"""Clients of other projects, in an environment of their own, against a CrossPool server."""
