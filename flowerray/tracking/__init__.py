"""All of MLflow: runs, curves, files, models."""
