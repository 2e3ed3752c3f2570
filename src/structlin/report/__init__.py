"""Records of runs and what is made from them: tables, plots, pages. Nothing here imports torch."""
