"""What the commands do, with models and folders, and how the command line asks for it."""
