"""What runs have written into their directories: a list of them, and their differences."""
