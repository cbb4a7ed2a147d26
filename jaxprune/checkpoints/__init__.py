"""Folders and files, to and from `(model, params)`: Hugging Face names, atomic writes, sparse and shared files."""
