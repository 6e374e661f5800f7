"""The `dropforge` command. A command reads settings, calls the module that does the work, and prints."""
