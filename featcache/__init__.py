"""Stage one: images in, features in Zarr out. The lowest layer."""
