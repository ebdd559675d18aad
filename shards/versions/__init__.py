"""Versions of a data set: filtered, without duplicates, merged, split. A version is a manifest with row masks; tars stay as they are."""
