"""Everything between a bundle and tokens: memory plan, weights, state, streamed experts, sampling."""
