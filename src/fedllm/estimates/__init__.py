"""What a round costs, foreseen by formula: for plans, and for choices that a run makes itself."""
