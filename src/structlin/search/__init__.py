"""Which structure to use: candidates trained under one budget, kept in a study that survives whatever happens."""
