"""Features whose inputs, effect and causes agree."""
