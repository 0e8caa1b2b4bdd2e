"""Simulations of what the server decides, with the code that decides it there."""
