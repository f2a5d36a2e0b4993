"""A packed checkpoint as a thing to keep, look at and give away: save, card, report, inspect, open."""
