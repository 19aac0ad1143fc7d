"""What fits a budget: tiers, slots, cards, and what they cost in quality. Arithmetic only."""
