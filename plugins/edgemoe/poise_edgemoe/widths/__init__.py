"""Which bits each expert gets: plans, and how they are chosen."""
