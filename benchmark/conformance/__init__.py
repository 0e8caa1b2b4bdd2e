"""Other projects' own tests, run over CrossPool servers. Their checkouts are named by path."""
