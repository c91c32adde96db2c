"""A data set before anything is trained on it: counts, pictures, faults and near-duplicates."""
