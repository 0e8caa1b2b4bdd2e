"""Kills, stops and slows the processes of a server under load, and checks every answer against a
run without faults."""
