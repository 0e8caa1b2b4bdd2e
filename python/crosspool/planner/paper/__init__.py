"""Table 1 and Figures 2 and 6 of the CrossPool paper (arXiv 2606.24506), computed again."""
