"""Passages of files, found again by what they say, with the file and the lines they stand in."""
