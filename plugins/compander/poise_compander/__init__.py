"""The compander plugin of Poise."""
