"""One run that tells everything about a GPU on which CrossPool has never run."""
