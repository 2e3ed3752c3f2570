"""Sub-commands of ``structlin`` that have no package of their own."""
