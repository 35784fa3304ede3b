"""The fault laboratory: each fault is made for real, and what must follow is checked."""
