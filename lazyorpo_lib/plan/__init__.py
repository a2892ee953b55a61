"""Will it fit, how long: a step on fake tensors, the choice, the cards."""
