"""One training, without Ray and without MLflow."""
