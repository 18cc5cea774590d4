"""The subcommands of difftrain: one file a command."""
