"""Fault injection: each test makes a real fault and checks what follows."""
