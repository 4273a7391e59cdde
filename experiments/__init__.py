"""Command-line programs: flags and files only, no algorithm."""
