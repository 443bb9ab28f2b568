"""One runner for prediction, evaluation and submission: inputs, a predictor, outputs."""
