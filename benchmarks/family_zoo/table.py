"""docs/families.md from the outcomes of `benchmarks/families.py`."""

def write_table(o): pass
