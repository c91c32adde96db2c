"""Photographs that were embedded once, to be searched: a folder that grows and can be checked."""
