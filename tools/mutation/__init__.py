"""What ``tools/mutate_files.py`` does to files, how it reads them then, and in which processes."""
