"""The offline KV planner: from traffic and model shapes to the KV pool's page budget.

No torch in here: numpy and scipy only."""
