"""x."""
def add(commands, common): pass
