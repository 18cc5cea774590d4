"""The run directory's files, read and written without torch."""
