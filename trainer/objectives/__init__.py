"""What the network learns to predict: one file a kind."""
