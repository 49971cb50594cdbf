"""The softmax engine: summaries of logits, their gradient, and the backends that compute both."""
