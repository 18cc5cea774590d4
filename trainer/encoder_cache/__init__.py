"""Section `cache`: what the frozen encoders make of pictures and captions, kept. One file a kind."""
