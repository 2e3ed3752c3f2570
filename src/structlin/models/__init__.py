"""Small models to train and measure structures in."""
