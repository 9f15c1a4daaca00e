"""Which file names mean images, where a folder or a tar is looked through for them."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""In small letters; where one thing has several images, the first of these counts."""

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
"""The same with their dots, as `str.endswith` takes them."""
