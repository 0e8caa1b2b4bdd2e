"""The offline planner behind ``crosspool plan``: devices, page budget and placement for models and
their traffic, without torch."""
