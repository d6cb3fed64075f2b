"""Training of the L1 parameters: data, examples, and the loop that learns from them."""
