"""The stores: the only package that asks fsspec for anything."""
