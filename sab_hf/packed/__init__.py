"""Modules that hold sign planes in place of a dense weight: how they run, load, are checked and swapped."""
