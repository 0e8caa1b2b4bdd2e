"""KV demand of traffic at a random time or over a trace, its quantiles, and the page budget."""
