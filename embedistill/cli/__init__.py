"""The command line, `embedistill`."""
