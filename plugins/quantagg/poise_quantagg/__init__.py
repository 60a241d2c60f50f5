"""The quantagg plugin of Poise."""
