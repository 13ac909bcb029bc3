"""Flow-matching sampling as a Markov chain: transitions, chains, their log-probabilities and the noise network."""
