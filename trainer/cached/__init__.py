"""What a frozen network answered, kept on disk: entries of a 16-byte key and a tensor, of whatever network."""
