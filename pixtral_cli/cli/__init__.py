"""All that meets a terminal: `main` runs a command line; what the commands share (flags, console) knows no command."""
