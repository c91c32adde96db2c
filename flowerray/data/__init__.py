"""Photographs: readers, the decoded store, batches, augmentation."""
