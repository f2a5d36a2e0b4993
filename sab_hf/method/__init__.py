"""The paper, one matrix at a time: second moments, significance, fit, trainable planes, budget. No model is known here."""
