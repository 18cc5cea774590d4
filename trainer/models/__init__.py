"""Model families: one file a kind."""
