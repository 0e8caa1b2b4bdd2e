"""Other engines on the same checkpoint, each in a process and an environment of its own."""
