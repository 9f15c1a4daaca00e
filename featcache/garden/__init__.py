"""How the garden is drawn: species, plants, settings; see `featcache.datasets.garden`."""
