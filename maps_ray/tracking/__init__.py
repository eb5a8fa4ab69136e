"""MLflow without waiting for it and without losing a step."""
