"""A whole plan from the planners of both pools: devices, budget, parallelism, placement, what other
ways to serve would give; as data, tables, a plot, and a deployment file. No torch in here."""
