"""What every other folder may use: errors, checks, files, processes. It imports nothing of this package."""
