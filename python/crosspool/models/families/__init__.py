"""Families of models that the server runs, one file each. The registry lists this folder."""
