"""A model on disk, its experts apart: schemes, the index, where models come from, conversion, reading."""
