"""What fits a budget: ladders, slots, cards, and what they cost in quality. Arithmetic only."""
