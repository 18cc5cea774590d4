"""What happens around the steps: one file a hook."""
