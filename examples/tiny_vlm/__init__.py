"""A small vision-language model, trained from nothing, and the visual world it answers questions about."""
