"""Training of one model per structure on the same text, and the runner that compares them."""
