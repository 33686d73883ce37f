"""What a written model holds, and what deployment engines make of it."""
