"""How Minnow is made: its architecture, what it practises, the training loop, and the study of what it has learnt."""
