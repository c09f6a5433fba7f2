"""Products with few active features a row."""
