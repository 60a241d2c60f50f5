"""The bone plugin of Poise."""
