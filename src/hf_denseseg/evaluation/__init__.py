"""From predictions and ground truth to scores; no model is run here."""
